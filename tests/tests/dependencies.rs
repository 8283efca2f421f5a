//! Who depends on what: the packages this project is built on, and the layers it keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--no-deps", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("metadata is JSON")
}

/// The direct, shipped dependencies of each member by name.
fn direct(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let members: Vec<_> = metadata["workspace_members"].as_array().into_iter().flatten().collect();
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|package| members.contains(&&package["id"]))
        .map(|package| {
            let dependencies = package["dependencies"].as_array().into_iter().flatten();
            let shipped = dependencies.filter(|dependency| dependency["kind"].is_null());
            let names =
                shipped.filter_map(|dependency| dependency["name"].as_str().map(str::to_owned)).collect();
            (package["name"].as_str().unwrap_or_default().to_owned(), names)
        })
        .collect()
}

#[test]
fn the_packages_of_the_card_are_direct_dependencies_where_the_design_says() {
    let direct = direct(&metadata());
    let wanted = [
        (
            "shutdown-core",
            ["tokio", "tokio-util", "signal-hook-tokio", "socket2", "serde_json", "parking_lot"].as_slice(),
        ),
        ("shutdown-tower", &["tower", "hyper"]),
        ("shutdown-mdns", &["mdns-sd", "socket2"]),
    ];
    for (member, packages) in wanted {
        let dependencies = direct.get(member).unwrap_or_else(|| panic!("{member} is missing"));
        for package in packages {
            assert!(
                dependencies.contains(*package),
                "{member} does not depend on {package}: {dependencies:?}"
            );
        }
    }
}

#[test]
fn core_pulls_in_no_protocol_and_no_adapter_knows_another() {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--offline",
            "-e",
            "normal",
            "--all-features",
            "--prefix",
            "none",
            "-p",
            "shutdown-core",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let tree = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(tree.lines().any(|line| line.starts_with("tokio ")), "{tree}");
    for banned in ["hyper", "http", "h2", "axum", "tower", "pingora-core", "pingora-proxy", "mdns-sd"] {
        let found = tree.lines().find(|line| line.split(' ').next() == Some(banned));
        assert_eq!(found, None, "shutdown-core pulls in {banned}");
    }
    let adapters = ["shutdown-tower", "shutdown-pingora", "shutdown-mdns", "shutdown-pgbouncer"];
    let direct = direct(&metadata());
    for (adapter, dependencies) in direct.iter().filter(|(name, _)| adapters.contains(&name.as_str())) {
        let sideways: Vec<_> = adapters.iter().filter(|other| dependencies.contains(**other)).collect();
        assert!(sideways.is_empty(), "{adapter} knows {sideways:?}");
        assert!(dependencies.contains("shutdown-core"));
    }
}

/// The direct dependencies of shutdown-core with these features, and no others.
fn of_core(features: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "-e", "normal", "--prefix", "none", "--depth", "1"])
        .args(["-p", "shutdown-core", "--no-default-features", "--features", features])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8_lossy(&output.stdout).into_owned();
    tree.lines().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect()
}

#[test]
fn the_state_and_the_peers_add_three_packages_systemd_two_beyond_signals_and_sockets_and_the_breakers_none() {
    let bare = of_core("");
    let added: Vec<_> = of_core("state").difference(&bare).cloned().collect();
    assert_eq!(added, ["crc32fast", "rustix", "serde_json"]);
    assert_eq!(of_core("breaker"), bare);
    let added: Vec<_> = of_core("peers").difference(&bare).cloned().collect();
    assert_eq!(added, ["hmac", "sha2", "socket2"]);
    let added: Vec<_> = of_core("systemd").difference(&of_core("signals,net")).cloned().collect();
    assert_eq!(added, ["listenfd", "sd-notify"]);
}
