//! The guide: its local commands are run, and its kubectl lines name what there is.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;
use shutdown_tests::process::{Process, binary};
use shutdown_tests::servers::{Installed, Postgres, as_user, pgbouncers};
use shutdown_tests::{PATIENCE, process::Stopwatch};

use crate::manifests::{containers, documents, manifests};
use crate::settings::with_server;
use crate::{file, name_what_is_missing, replaced, root};

const GUIDE: &str = "docs/pgbouncer.md";
/// Where everything is in the guide.
pub(crate) const NAMESPACE: &str = "data";
/// Before this heading PgBouncer does not run.
const STARTED: &str = "## Step 4: deploy";

/// A fenced block: its language, its text without the fence's indentation, and the line it begins in.
struct Block {
    language: String,
    text: String,
    line: usize,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut depth = None;
    for (index, line) in text.lines().enumerate() {
        let bare = line.trim_start();
        match (depth, bare.strip_prefix("```")) {
            (None, Some(language)) => {
                depth = Some(line.len() - bare.len());
                blocks.push(Block { language: language.to_owned(), text: String::new(), line: index + 2 });
            }
            (Some(_), Some(_)) => depth = None,
            (Some(depth), None) => {
                let block = blocks.last_mut().expect("it began");
                block.text.extend([line.get(depth..).unwrap_or(""), "\n"]);
            }
            (None, None) => {}
        }
    }
    assert!(depth.is_none(), "a block does not end");
    blocks
}

/// The words of each kubectl line, and where it stands.
fn kubectl(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut lines = Vec::new();
    for block in blocks(text).into_iter().filter(|block| block.language == "console") {
        for (index, line) in block.text.lines().enumerate() {
            if let Some(command) = line.strip_prefix("$ ") {
                let words = command.split_whitespace().map(ToOwned::to_owned).collect();
                lines.push((block.line + index, words));
            }
        }
    }
    lines
}

/// What the manifests have: `deployment/pgbouncer`, `container pgbouncer`, `label a=b`, `key database-url`.
fn there_is() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for manifest in manifests() {
        let text = file(&manifest);
        for document in documents(&text) {
            let kind = document["kind"].as_str().expect("a kind").to_lowercase();
            let kind = if kind == "service" { "svc" } else { &kind };
            found.insert(format!("{kind}/{}", document["metadata"]["name"].as_str().expect("a name")));
            let labels = document["spec"]["template"]["metadata"]["labels"].as_object();
            for (key, value) in labels.into_iter().flatten() {
                found.insert(format!("label {key}={}", value.as_str().expect("a text")));
            }
            assert!(document["metadata"]["namespace"].is_null(), "{manifest}: the namespace is the reader's");
        }
        for container in containers(&text) {
            found.insert(format!("container {}", container["name"].as_str().expect("a name")));
        }
        // Secrets are made by hand, and there for whoever names them.
        secrets(&serde_saphyr::from_multiple::<Value>(&text).expect("YAML").into(), &mut found);
    }
    found
}

fn secrets(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            let names =
                [&value["secretKeyRef"]["name"], &value["secret"]["secretName"], &value["secret"]["name"]];
            for name in names.into_iter().filter_map(Value::as_str) {
                found.insert(format!("secret/{name}"));
            }
            if let Some(key) = value["secretKeyRef"]["key"].as_str() {
                found.insert(format!("key {key}"));
            }
            fields.values().for_each(|value| secrets(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| secrets(item, found)),
        _ => {}
    }
}

/// What a kubectl line names that is not there.
fn problems(words: &[String], there_is: &BTreeSet<String>) -> Vec<String> {
    let mut problems = Vec::new();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ours = words.iter().position(|word| *word == "--").map_or(words.len(), |end| end);
    let (ours, _) = words.split_at(ours);
    if ours.first() != Some(&"kubectl") {
        return vec![format!("{words:?} is no kubectl")];
    }
    let namespaces: Vec<_> =
        ours.windows(2).filter(|pair| ["-n", "--namespace"].contains(&pair[0])).collect();
    let makes_it = ours[1..] == ["create", "namespace", NAMESPACE];
    match namespaces[..] {
        [pair] if pair[1] == NAMESPACE => {}
        [] if makes_it => return problems,
        _ => problems.push(format!("not in the namespace {NAMESPACE}")),
    }
    let mut wanted = Vec::new();
    // The nouns after `kubectl`, options and their values left out.
    let mut nouns = Vec::new();
    let mut rest = ours[1..].iter();
    while let Some(word) = rest.next() {
        match *word {
            "-n" | "--namespace" => {
                rest.next();
            }
            "-l" => wanted.extend(rest.next().map(|label| format!("label {label}"))),
            "-c" => wanted.extend(rest.next().map(|name| format!("container {name}"))),
            "-f" if nouns.first() == Some(&"logs") => {}
            "-f" => {
                let path = rest.next().unwrap_or(&"nothing");
                if !root().join(path).is_file() {
                    problems.push(format!("there is no file {path}"));
                }
            }
            "--patch-file" => {
                let path = rest.next().unwrap_or(&"nothing");
                if !file(GUIDE).contains(&format!(">{path}\n")) {
                    problems.push(format!("no command writes {path}"));
                }
            }
            option if option.starts_with('-') => {}
            noun => nouns.push(noun),
        }
    }
    let resource = |kind: &str, name: &str| {
        let kind = match kind {
            "deploy" | "deployments" => "deployment",
            "service" | "services" => "svc",
            "secrets" => "secret",
            other => other,
        };
        format!("{kind}/{name}")
    };
    match nouns[..] {
        ["apply"] | ["auth", "can-i", ..] | ["run", ..] => {}
        ["delete"] if ours.contains(&"-f") => {}
        ["get" | "describe", "pods"] if !wanted.is_empty() => {}
        ["create", "secret", "generic", name] => wanted.push(resource("secret", name)),
        ["rollout", "status" | "restart", named] | ["logs" | "port-forward", named, ..] => {
            match named.split_once('/') {
                Some((kind, name)) => wanted.push(resource(kind, name)),
                None => problems.push(format!("{named} is of no kind")),
            }
        }
        ["get" | "describe" | "delete" | "patch", kind, name] => wanted.push(resource(kind, name)),
        _ => problems.push(format!("a command that this test does not know: {nouns:?}")),
    }
    problems
        .extend(wanted.into_iter().filter(|what| !there_is.contains(what)).map(|what| format!("no {what}")));
    problems
}

#[test]
fn every_kubectl_line_of_the_guide_names_what_the_manifests_have() {
    let there_is = there_is();
    let text = file(GUIDE);
    let lines = kubectl(&text);
    assert!(lines.len() >= 20, "{} lines", lines.len());
    for (line, words) in &lines {
        let problems = problems(words, &there_is);
        assert!(problems.is_empty(), "{GUIDE}:{line}: {}: {problems:?}", words.join(" "));
    }
    // Nowhere else: a kubectl line in a block of another kind would not be looked at.
    let other = blocks(&text).into_iter().filter(|block| block.language != "console");
    for block in other {
        assert!(!block.text.contains("kubectl "), "{GUIDE}:{}: kubectl belongs into `console`", block.line);
    }
    // The key that the patches write is the one that the service reads.
    assert!(there_is.contains("key database-url") && text.contains("stringData: { database-url: "));

    let wrong = [
        ("kubectl rollout status deployment/pgbouncer -n nova", "not in the namespace"),
        ("kubectl rollout status deployment/pgbouncer", "not in the namespace"),
        ("kubectl logs deployment/user-service -n data", "no deployment/user-service"),
        ("kubectl logs deployment/pgbouncer -c sidecar -n data", "no container sidecar"),
        ("kubectl apply -f k8s/infrastructure/pgbouncer/ -n data", "no file k8s/"),
        ("kubectl get pods -l app=pgbouncer -n data", "no label app=pgbouncer"),
        ("kubectl describe secret pgbouncer-credentials -n data", "no secret/pgbouncer-credentials"),
        ("kubectl port-forward svc/pgbouncer-exporter 9127:9127 -n data", "no svc/pgbouncer-exporter"),
        ("kubectl patch secret axum-service --patch-file url.yaml -n data", "no command writes url.yaml"),
        ("kubectl exec svc/pgbouncer -n data -- psql", "does not know"),
    ];
    for (line, what) in wrong {
        let words: Vec<_> = line.split(' ').map(ToOwned::to_owned).collect();
        let problems = problems(&words, &there_is);
        assert!(problems.iter().any(|problem| problem.contains(what)), "{line}: {problems:?}");
    }
}

#[test]
fn the_sums_of_the_guide_are_those_of_the_files() {
    let text = file(GUIDE).replace('\n', " ");
    let ini = crate::ini();
    let of = |key: &str| -> u64 {
        let value = ini.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        value.unwrap_or_else(|| panic!("no {key}")).parse().expect("a number")
    };
    let deployment = documents(&file("deploy/pgbouncer/kubernetes/pgbouncer.yaml"))
        .into_iter()
        .find(|document| document["kind"] == "Deployment")
        .expect("a Deployment");
    let replicas = deployment["spec"]["replicas"].as_u64().expect("a count");
    let surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"].as_u64().expect("a count");
    let (most, least) = (of("max_db_connections"), of("min_pool_size"));
    assert_eq!(most, of("default_pool_size") + of("reserve_pool_size"));
    let pods = replicas + surge;
    let all = pods * most + 30 + 3;
    for sum in [
        format!("{pods} × {most} = {}", pods * most),
        format!("that is {all} of 200"),
        format!("{least} × {replicas} = {}", least * replicas),
        format!("{most} × {replicas} = {}", most * replicas),
        "3 + 20 + 5 + 2 = 30 seconds".to_owned(),
        "58 + 5 + 2 = 65".to_owned(),
    ] {
        assert!(text.contains(&sum), "{GUIDE} does not say {sum:?}");
    }
    assert!(all <= 200, "PostgreSQL would refuse connections");
    let rules = file("deploy/pgbouncer/prometheus/pgbouncer.rules.yml");
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert_eq!(alerts.len(), 7, "the guide says seven: {alerts:?}");
    for alert in alerts {
        assert!(text.contains(&format!("`{alert}`")), "{GUIDE} does not name {alert}");
    }
}

#[test]
fn every_link_of_the_guide_leads_somewhere() {
    let text = file(GUIDE);
    let headings: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .map(|line| line.trim_start_matches('#').trim().to_lowercase())
        .map(|line| line.chars().filter(|c| c.is_alphanumeric() || " -".contains(*c)).collect::<String>())
        .map(|line| line.replace(' ', "-"))
        .collect();
    let links: Vec<_> =
        text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(to, _)| to).collect();
    assert!(links.len() >= 10, "{links:?}");
    for link in links {
        let is_there = match link.strip_prefix('#') {
            Some(heading) => headings.iter().any(|known| known == heading),
            None => Path::new(&root().join("docs").join(link.split('#').next().expect("a part"))).exists(),
        };
        assert!(is_there, "{GUIDE} leads to {link}");
    }
}

/// Runs blocks as one script, by the user that runs PgBouncer, in PgBouncer's directory, and says how it ended.
fn run(blocks: &[&Block], installed: &Installed, postgres: &Postgres, dir: &Path) -> Result<String, String> {
    let pgbctl = binary("pgbctl");
    let places = [pgbctl.parent(), installed.program().parent(), Some(postgres.programs())];
    let mut path: String =
        places.into_iter().flatten().map(|place| format!("{}:", place.display())).collect();
    path.push_str("/usr/local/bin:/usr/bin:/bin");
    let mut script = "set -eu\n".to_owned();
    for block in blocks {
        // What fails is found by the last of these lines.
        writeln!(script, "echo '== {GUIDE}:{}' >&2\n{}", block.line, block.text).expect("a text takes all");
    }
    let shown = dir.display();
    let mut shell = as_user("postgres", "sh".as_ref());
    shell.args(["-c", &script]).current_dir(dir).env("PATH", path);
    shell.env("SERVER", format!("{}&connect_timeout=10", postgres.url_over_socket()));
    shell.env("SOCKETS", format!("{shown}")).env("USERLIST", format!("{shown}/userlist.txt"));
    shell.env("PGBCTL_CONFIG", format!("{shown}/pgbouncer.ini")).env("SECONDS_EACH", "1").env("HOME", dir);
    let mut process = Process::start(&mut shell);
    let status = process.ended(PATIENCE * 3);
    let said = format!("{}\n{}", process.stdout(), process.stderr());
    if status.success() { Ok(said) } else { Err(format!("{status}:\n{said}")) }
}

#[test]
fn every_local_command_of_the_guide_runs_in_order() {
    name_what_is_missing();
    let text = file(GUIDE);
    let started = text.lines().position(|line| line == STARTED).expect("the heading") + 1;
    let blocks: Vec<_> = blocks(&text).into_iter().filter(|block| block.language == "sh").collect();
    assert!(blocks.len() >= 10, "{} blocks", blocks.len());
    let (before, after): (Vec<_>, Vec<_>) = blocks.iter().partition(|block| block.line < started);
    // Its variables, for each shell.
    let variables = before[0];
    assert!(variables.text.contains("SERVER="), "the first block sets the variables");
    let after: Vec<_> = std::iter::once(variables).chain(after).collect();
    for installed in pgbouncers() {
        let begin = Stopwatch::start();
        let postgres = Postgres::start_with(&["max_connections=200"]);
        let laid_out = installed.lay_out(&with_server(&postgres), "");
        let dir = laid_out.dir().to_owned();
        let said = run(&before, &installed, &postgres, &dir);
        let said = said.unwrap_or_else(|said| panic!("PgBouncer {installed}: {said}"));
        assert!(said.contains("scram-sha-256") && said.contains("app"), "{said}");
        let sql = std::fs::read_to_string(dir.join("app.sql")).expect("the guide makes it");
        let users = std::fs::read_to_string(dir.join("userlist.txt")).expect("it is there");
        let verifier = users.split('"').find(|word| word.starts_with("SCRAM-SHA-256$")).expect("a verifier");
        assert!(sql.contains(verifier), "the server is given another one: {sql}");
        assert_eq!(postgres.query("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'"), verifier);

        let mut pgbouncer = laid_out.start().unwrap_or_else(|said| panic!("PgBouncer {installed}: {said}"));
        let said = run(&after, &installed, &postgres, &dir);
        let said = said.unwrap_or_else(|said| panic!("PgBouncer {installed}: {said}\n{}", pgbouncer.log()));
        // The last command stops it.
        pgbouncer.ended(PATIENCE);
        assert!(said.contains("latency average"), "{said}");
        let settings = std::fs::read_to_string(dir.join("pgbouncer.ini")).expect("it is there");
        assert_eq!(settings, laid_out_text(&postgres, &dir), "what was changed is not back");
        println!("PgBouncer {installed}: {} blocks in {:?}", blocks.len(), begin.elapsed());
    }

    // A command that fails is red, and found.
    let installed = &pgbouncers()[0];
    let postgres = Postgres::start();
    let laid_out = installed.lay_out(&with_server(&postgres), "");
    let wrong = Block { language: "sh".to_owned(), text: "false\ntrue\n".to_owned(), line: 1 };
    let failed = run(&[variables, &wrong], installed, &postgres, laid_out.dir()).expect_err("it fails");
    assert!(
        failed.contains("== docs/pgbouncer.md:1\n") || failed.ends_with("== docs/pgbouncer.md:1"),
        "{failed}"
    );
}

/// The settings as they were laid out there.
fn laid_out_text(postgres: &Postgres, dir: &Path) -> String {
    let here = dir.display().to_string();
    let text = replaced(&replaced(&with_server(postgres), "/etc/pgbouncer", &here), "/run/pgbouncer", &here);
    text.lines().filter(|line| !line.starts_with("listen_addr")).flat_map(|line| [line, "\n"]).collect()
}
