//! What is known to go wrong with a PgBouncer, looked for.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::console::Console;
use crate::pgbouncer::not_found;
use crate::references::{self, Eyes};
use crate::{Error, Ini, PgBouncer, Userlist, Version};

/// Something that will go wrong, or has: one sentence that names it and the fix.
pub type Diagnosis = String;

/// Looks for what is known to go wrong: settings that clients stumble over, databases left paused, a stale PID file, files
/// and directories that are missing, files that others can read. What PgBouncer would refuse, [`check`](crate::check()) tells.
///
/// # Errors
///
/// [`Error::Unwritten`]: the configuration cannot be read.
///
/// # Cancel safety
///
/// Cancel safe: it only looks.
pub async fn diagnose(pgbouncer: &PgBouncer) -> Result<Vec<Diagnosis>, Error> {
    let ini = crate::whole(pgbouncer.config())?;
    let mut found = Vec::new();
    let address = pgbouncer.console(&ini);
    let mut version = None;
    match Console::open(&address).await {
        Ok(console) => {
            version = console.version().await.ok();
            if let Ok(rows) = console.tell("SHOW DATABASES").await {
                for (column, what, fix) in
                    [("paused", "paused", "RESUME"), ("disabled", "disabled", "ENABLE")]
                {
                    let is = |row: &&crate::Row| row.get(column).is_some_and(|value| value == "1");
                    for row in rows.iter().filter(is) {
                        let name = row.get("name").map_or("", String::as_str);
                        found.push(format!("database {name} is {what}: {fix} it unless that is meant"));
                    }
                }
            }
            // From 1.19 on; before, nobody tells.
            if let Ok(rows) = console.tell("SHOW STATE").await
                && rows.iter().any(|row| {
                    row.get("key").is_some_and(|key| key == "paused")
                        && row.get("value").is_some_and(|value| value == "yes")
                })
            {
                found.push("it is paused, and no client gets on: RESUME it unless that is meant".to_owned());
            }
            console.close().await;
        }
        Err(error) => found.push(format!("{error}; reloads cannot be verified, and nothing can be drained")),
    }
    settings(&ini, version.unwrap_or(Version::OLDEST), &mut found);
    let missing = references::missing(&ini, &Eyes::OURS).into_iter();
    found.extend(missing.map(|missing| missing.problem.what));
    match pgbouncer.process(&ini) {
        None => found.push(
            "there is no pidfile: edits do not reload by themselves, and `stop` has nobody to end".to_owned(),
        ),
        Some(process) => {
            if let Err(why) = process.find().await {
                found.push(format!("its process is not found: {}", not_found(&why)));
            }
        }
    }
    if let Ok(list) = pgbouncer.userlist_path() {
        userlist(&list, &ini, &mut found);
    }
    Ok(found)
}

fn settings(ini: &Ini, version: Version, found: &mut Vec<Diagnosis>) {
    let value = |key: &str| ini.parameter(key).unwrap_or_default();
    let word = |key: &str| value(key).to_ascii_lowercase();
    let pools_transactions = ["transaction", "statement"].contains(&word("pool_mode").as_str());
    if !value("ignore_startup_parameters").split(',').any(|name| name.trim() == "extra_float_digits") {
        found.push(
            "ignore_startup_parameters does not have extra_float_digits: sqlx, JDBC and the exporter are refused".to_owned(),
        );
    }
    let since = |minor| version >= Version { major: 1, minor };
    let prepared = value("max_prepared_statements");
    if pools_transactions && !since(21) {
        found.push(format!(
            "PgBouncer {version} keeps no prepared statements over transactions: clients that use them (sqlx, most ORMs) fail; \
             take 1.21 or newer, or pool_mode = session"
        ));
    } else if pools_transactions && (prepared == "0" || prepared.is_empty() && !since(24)) {
        found.push("max_prepared_statements is 0: clients that prepare statements fail in this pool_mode; set it to 200".to_owned());
    }
    let is_open = ["*", "0.0.0.0", "::"]
        .iter()
        .any(|all| value("listen_addr").split(',').any(|address| address.trim() == *all));
    if is_open && ["any", "trust"].contains(&word("auth_type").as_str()) {
        found.push(format!(
            "auth_type = {} on every address lets everybody in: set scram-sha-256",
            value("auth_type")
        ));
    }
    if ["md5", ""].contains(&word("auth_type").as_str()) {
        found.push("auth_type is md5: set scram-sha-256 once the user list has verifiers".to_owned());
    }
}

fn userlist(path: &Path, ini: &Ini, found: &mut Vec<Diagnosis>) {
    let name = path.display();
    let (Ok(metadata), Ok(bytes)) = (path.metadata(), std::fs::read(path)) else {
        return found.push(format!("the user list {name} cannot be read"));
    };
    if metadata.permissions().mode() & 0o004 != 0 {
        found.push(format!("the user list {name} can be read by everybody: chmod o= {name}"));
    }
    let list = Userlist::new(bytes);
    if list.users().is_empty() {
        found.push(format!("the user list {name} is empty: nobody can log in"));
    }
    for user in list.users().iter().filter(|user| user.kind == "md5") {
        found.push(format!(
            "user {:?} has an md5 hash: with a server that has SCRAM verifiers the login works and every query fails; `pgbctl user \
             add` makes one verifier for both",
            user.name
        ));
    }
    // "pgbouncer" needs no password on the socket, from the user that runs PgBouncer. The socket is there unless it is turned off.
    let has_socket = ini.parameter("unix_socket_dir").is_none_or(|directory| !directory.is_empty());
    for admin in ini
        .parameter("admin_users")
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .filter(|name| !(name.is_empty() || has_socket && *name == "pgbouncer"))
    {
        if !list.users().iter().any(|user| user.name == admin) {
            found.push(format!("admin user {admin:?} is not in the user list {name}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, version: Version) -> Vec<Diagnosis> {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("userlist.txt");
        std::fs::write(&list, "\"app\" \"SCRAM-SHA-256$4096:c2FsdA==$a2V5:a2V5\"\n").unwrap();
        std::fs::set_permissions(&list, std::fs::Permissions::from_mode(0o600)).unwrap();
        let ini = Ini::new(text.as_bytes().to_vec());
        let mut found = Vec::new();
        settings(&ini, version, &mut found);
        userlist(&list, &ini, &mut found);
        found
    }

    #[test]
    fn the_settings_that_are_shipped_are_clean_from_1_24_on() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/pgbouncer/pgbouncer.ini");
        let shipped = std::fs::read_to_string(shipped).unwrap();
        for minor in [24, 25, 26] {
            assert_eq!(found(&shipped, Version { major: 1, minor }), [""; 0], "1.{minor}");
        }
        let old = found(&shipped, Version::OLDEST);
        assert!(old.len() == 1 && old[0].contains("prepared statements"), "{old:?}");
    }

    #[test]
    fn an_admin_without_a_password_is_found_but_for_pgbouncer_on_a_socket() {
        let of = |more: &str| {
            let text = format!(
                "[pgbouncer]\nauth_type = scram-sha-256\nignore_startup_parameters = extra_float_digits\n\
                 admin_users = pgbouncer, app, boss\n{more}"
            );
            found(&text, Version { major: 1, minor: 24 })
        };
        for socket in ["", "unix_socket_dir = /run/pgbouncer\n"] {
            let found = of(socket);
            assert!(found.len() == 1 && found[0].contains("\"boss\""), "{found:?}");
        }
        let found = of("unix_socket_dir =\n");
        assert!(found.len() == 2 && found[0].contains("\"pgbouncer\""), "{found:?}");
    }
}
