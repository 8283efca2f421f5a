//! The manifests, by Kubernetes' own schemas, and what they say about each other.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use shutdown_tests::servers::target;

use crate::{file, ini, replaced, root, said};

/// The validator, which brings the schemas of every version up to its own.
const VALIDATOR: &str = "kubernetes-validate==1.37.0";
const KUBERNETES: &str = "1.33";

const POOLER: &str = "deploy/pgbouncer/kubernetes/pgbouncer.yaml";
const SIDECAR: &str = "deploy/pgbouncer/kubernetes/app-with-sidecar.yaml";

/// All manifests.
pub(crate) fn manifests() -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["deploy/kubernetes", "deploy/pgbouncer/kubernetes"] {
        for entry in std::fs::read_dir(root().join(folder)).expect("it is there").flatten() {
            found.push(format!("{folder}/{}", entry.file_name().to_str().expect("a text")));
        }
    }
    found.sort();
    assert!(found.len() >= 4, "{found:?}");
    found
}

/// The resources of a manifest.
pub(crate) fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).expect("YAML")
}

/// The containers of its pods, those that begin first among them.
pub(crate) fn containers(text: &str) -> Vec<Value> {
    let mut found = Vec::new();
    for document in documents(text) {
        let pod = &document["spec"]["template"]["spec"];
        for kind in ["initContainers", "containers"] {
            found.extend(pod[kind].as_array().into_iter().flatten().cloned());
        }
    }
    found
}

/// The validator, in an environment of its own below the target folder, made once.
fn validator() -> &'static PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = target().join("kubernetes-validate");
        let program = dir.join("bin/kubernetes-validate");
        let (_, version) = VALIDATOR.split_once("==").expect("name==version");
        let runs = || {
            program.exists() && {
                let (ran, said) = said(Command::new(&program).arg("--version"));
                ran && said.contains(version)
            }
        };
        if !runs() {
            let made = said(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&dir));
            assert!(made.0, "python3-venv is missing: run tests/run, which installs it: {}", made.1);
            let install = ["install", "--quiet", "--disable-pip-version-check", VALIDATOR];
            let (installed, why) = said(Command::new(dir.join("bin/pip")).args(install));
            assert!(installed && runs(), "{VALIDATOR} cannot be had: {why}");
        }
        program
    })
}

/// What Kubernetes of this version would say to a manifest.
fn validated(text: &str, version: &str) -> (bool, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("manifest.yaml");
    std::fs::write(&path, text).expect("a temporary file");
    said(Command::new(validator()).args(["--strict", "-k", version]).arg(path))
}

#[test]
fn kubernetes_has_nothing_to_say_about_the_manifests() {
    for manifest in manifests() {
        let (green, words) = validated(&file(&manifest), KUBERNETES);
        assert!(green, "{manifest}: {words}");
    }

    let text = file(POOLER);
    let grace = "terminationGracePeriodSeconds: 30";
    let (green, words) = validated(&replaced(&text, grace, "terminationGracePeriodSecond: 30"), KUBERNETES);
    assert!(!green && words.contains("terminationGracePeriodSecond"), "{words}");
    let (green, words) = validated(&replaced(&text, "minAvailable: 1", "minAvailable: [1]"), KUBERNETES);
    assert!(!green && words.contains("minAvailable"), "{words}");
    // What came in 1.29 is no word of 1.28, and the sidecar's policy none of 1.27.
    let hook = "exec: { command: [sh, -c, \"sleep 3; kill -INT 1; sleep 20\"] }";
    let sleep = replaced(&text, hook, "sleep: { seconds: 3 }");
    assert!(validated(&sleep, KUBERNETES).0);
    let (green, words) = validated(&sleep, "1.28");
    assert!(!green && words.contains("sleep"), "{words}");
    let sidecar = file(SIDECAR);
    assert!(validated(&sidecar, "1.29").0);
    let (green, words) = validated(&sidecar, "1.27");
    assert!(!green && words.contains("restartPolicy"), "{words}");
}

/// What is wrong with a manifest that no schema says.
fn problems(text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let documents = documents(text);
    for document in documents.iter().filter(|document| document["kind"] == "Deployment") {
        let spec = &document["spec"];
        let name = &document["metadata"]["name"];
        if spec["replicas"].as_u64().unwrap_or(1) < 2 {
            problems.push(format!("{name}: one replica"));
        }
        if spec["template"]["spec"]["automountServiceAccountToken"] != false
            && spec["template"]["spec"]["volumes"].to_string().contains("pgbouncer")
        {
            problems.push(format!("{name}: its pods may talk to the cluster"));
        }
    }
    for container in containers(text) {
        let name = &container["name"];
        for kind in ["requests", "limits"] {
            if container["resources"][kind]["memory"].is_null() {
                problems.push(format!("{name}: no {kind} of memory"));
            }
        }
        if container["livenessProbe"].is_null() {
            problems.push(format!("{name}: no livenessProbe"));
        }
        let takes_clients = name != "exporter";
        if takes_clients && container["readinessProbe"].is_null() && container["startupProbe"].is_null() {
            problems.push(format!("{name}: nothing says when it is ready"));
        }
        let context = &container["securityContext"];
        if context["allowPrivilegeEscalation"] != false || context["readOnlyRootFilesystem"] != true {
            problems.push(format!("{name}: a security context that is too wide"));
        }
        if container["ports"].to_string().contains("hostPort") {
            problems.push(format!("{name}: with a hostPort a rollout waits for a free node"));
        }
        let image = container["image"].as_str().unwrap_or_default();
        if let Some((_, version)) = image.split_once("pgbouncer-exporter:v") {
            let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
            if (parts.next(), parts.next()) < (Some(0), Some(11)) {
                problems.push(format!("{name}: {image} keeps a connection, and PgBouncer waits for it"));
            }
        }
    }
    // Every port that is named is some container's.
    let ports: Vec<Value> = containers(text)
        .iter()
        .flat_map(|container| container["ports"].as_array().cloned().unwrap_or_default())
        .map(|port| port["name"].clone())
        .collect();
    for service in documents.iter().filter(|document| document["kind"] == "Service") {
        for port in service["spec"]["ports"].as_array().into_iter().flatten() {
            if !ports.contains(&port["targetPort"]) {
                problems.push(format!("no container has the port {}", port["targetPort"]));
            }
        }
    }
    problems
}

#[test]
fn the_manifests_have_two_of_each_probes_limits_and_no_more_rights_than_they_need() {
    for manifest in manifests() {
        assert_eq!(problems(&file(&manifest)), <[String; 0]>::default(), "{manifest}");
    }
    let text = file(POOLER);
    let broken = [
        ("replicas: 2", "replicas: 1", "one replica"),
        ("automountServiceAccountToken: false", "automountServiceAccountToken: true", "may talk"),
        ("limits: { memory: 128Mi }", "limits: { cpu: 1 }", "no limits of memory"),
        ("livenessProbe:\n            tcpSocket", "startupProbe:\n            tcpSocket", "no livenessProbe"),
        ("readinessProbe:", "livenessProbe2:", "nothing says when"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "too wide"),
        ("containerPort: 6432 }", "containerPort: 6432, hostPort: 6432 }", "hostPort"),
        ("pgbouncer-exporter:v0.12.0", "pgbouncer-exporter:v0.10.2", "keeps a connection"),
        ("targetPort: metrics", "targetPort: stats", "no container has the port"),
    ];
    for (from, to, what) in broken {
        let problems = problems(&replaced(&text, from, to));
        assert!(problems.iter().any(|problem| problem.contains(what)), "{to}: {problems:?}");
    }
}

#[test]
fn the_config_map_is_the_file_that_every_pgbouncer_was_tried_with() {
    let settings = |text: &str| documents(text)[0]["data"]["pgbouncer.ini"].as_str().map(ToOwned::to_owned);
    let text = file(POOLER);
    assert_eq!(
        settings(&text),
        Some(ini()),
        "{POOLER} has other settings than deploy/pgbouncer/pgbouncer.ini"
    );
    let other = replaced(&text, "default_pool_size = 40", "default_pool_size = 41");
    assert_ne!(settings(&other), Some(ini()));

    // Both kinds of pods mount it, and one Secret, where the command looks.
    for manifest in [POOLER, SIDECAR] {
        let text = file(manifest);
        let pods = documents(&text);
        let pod = pods.iter().find(|document| document["kind"] == "Deployment").expect("a Deployment");
        let volumes = pod["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
        let sources = volumes.iter().find(|volume| volume["name"] == "settings").expect("settings");
        let sources = &sources["projected"]["sources"];
        assert_eq!(sources[0]["configMap"]["name"], documents(&file(POOLER))[0]["metadata"]["name"]);
        assert_eq!(sources[1]["secret"]["name"], "pgbouncer-userlist");
        let containers = containers(&text);
        let pooler = containers.iter().find(|container| container["name"] == "pgbouncer").expect("PgBouncer");
        let mounts = pooler["volumeMounts"].as_array().expect("mounts");
        for (name, path) in [("settings", "/etc/pgbouncer"), ("run", "/run/pgbouncer")] {
            let is_it = |mount: &&Value| mount["name"] == name && mount["mountPath"] == path;
            assert!(mounts.iter().any(|mount| is_it(&mount)), "{manifest}: {path} is not mounted");
            assert!(ini().contains(&format!("= {path}")), "the settings look elsewhere than {path}");
        }
    }
}
