//! What each kind of file under deploy/ says about times.

use std::time::Duration;

use serde_json::Value;

/// A time that is given, with its name; the name of what it must not be below; and why.
pub(crate) type Least = ((String, Duration), &'static str, &'static str);

/// What a file says.
#[derive(Default)]
pub(crate) struct Read {
    pub(crate) programs: Vec<Program>,
    pub(crate) least: Vec<Least>,
    /// What is wrong at first sight.
    pub(crate) problems: Vec<String>,
}

/// A program of ours under a platform.
#[derive(Default)]
pub(crate) struct Program {
    pub(crate) name: String,
    /// When the platform kills, and where that stands.
    pub(crate) grace: Option<(String, Duration)>,
    pub(crate) pre_stop: Duration,
    /// What the sidecars may take after it.
    pub(crate) sidecars: Duration,
    /// The `SHUTDOWN_*` variables.
    pub(crate) budgets: Vec<(String, String)>,
    pub(crate) has_companions: bool,
    pub(crate) readiness: Option<Probe>,
    pub(crate) liveness: Option<Probe>,
}

pub(crate) struct Probe {
    pub(crate) period: Duration,
    pub(crate) failures: u32,
    pub(crate) timeout: Duration,
}

/// How long a PgBouncer has after INT, for its transactions, and after TERM, to be gone: the first rungs of `pgbctl stop`.
const INT: Duration = Duration::from_secs(20);
const TERM: Duration = Duration::from_secs(5);

/// Whether nothing in a file is a time of a stop: it is for readers, or about a PgBouncer that runs, which
/// pgbouncer_deploy.rs looks at.
pub(crate) fn has_no_times(path: &str) -> bool {
    let is_of_a_pooler = path.starts_with("deploy/pgbouncer/") && !path.contains("/kubernetes/");
    path == "deploy/README.md" || path.ends_with(".dockerignore") || is_of_a_pooler
}

/// Reads a file as its platform would.
///
/// # Errors
///
/// It is of no known kind, or not what its kind should be.
pub(crate) fn read(path: &str, text: &str) -> Result<Read, String> {
    let place = path.strip_prefix("deploy/").unwrap_or(path);
    match place.strip_prefix("pgbouncer/").unwrap_or(place).split_once('/') {
        _ if has_no_times(path) => Ok(Read::default()),
        Some(("kubernetes", file)) if file.ends_with(".yaml") => kubernetes(&documents(text)?),
        Some(("compose", file)) if file.ends_with(".yaml") => compose(&documents(text)?),
        Some(("systemd", file)) if file.ends_with(".service") => service(file, &unit(text)?),
        Some(("systemd", file)) if file.ends_with(".socket") => socket(&unit(text)?),
        Some(("docker", file)) if file.starts_with("Dockerfile") => Ok(dockerfile(text)),
        _ => {
            Err("a file of no kind that tests/tests/grace.rs knows: teach it where its times are".to_owned())
        }
    }
}

fn documents(text: &str) -> Result<Vec<Value>, String> {
    serde_saphyr::from_multiple(text).map_err(|error| error.to_string())
}

fn seconds(value: &Value) -> Option<Duration> {
    value.as_u64().map(Duration::from_secs)
}

fn is_budget(name: &str) -> bool {
    name.starts_with("SHUTDOWN_")
}

/// A value as the environment has it.
fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

fn kubernetes(documents: &[Value]) -> Result<Read, String> {
    let mut read = Read::default();
    for document in documents {
        match document["kind"].as_str() {
            Some("Deployment") => {}
            Some("PodDisruptionBudget") => {
                disruption(document, documents, &mut read);
                continue;
            }
            Some("Service" | "ConfigMap") => continue,
            kind => return Err(format!("kind {kind:?}: teach tests/tests/grace.rs where its times are")),
        }
        let pod = &document["spec"]["template"]["spec"];
        let grace = seconds(&pod["terminationGracePeriodSeconds"]);
        let sidecars = sidecars(&pod["initContainers"], &mut read);
        let containers = pod["containers"].as_array().into_iter().flatten();
        if let Some(pooler) = containers.clone().find(|container| container["name"] == "pgbouncer") {
            of_pooler(pooler, grace, &mut read);
            continue;
        }
        for container in containers {
            let name = text_of(&container["name"]);
            let admin =
                container["ports"].as_array().into_iter().flatten().any(|port| port["name"] == "admin");
            for (probe, path) in [("readinessProbe", "/readyz"), ("livenessProbe", "/livez")] {
                let get = &container[probe]["httpGet"];
                if get["path"] != path || get["port"] != "admin" || !admin {
                    read.problems.push(format!("{name}: {probe} does not ask {path} on the port admin"));
                }
            }
            let hook = &container["lifecycle"]["preStop"];
            let pre_stop = match seconds(&hook["sleep"]["seconds"]) {
                Some(pre_stop) => pre_stop,
                None if hook.is_null() => Duration::ZERO,
                None => {
                    return Err(format!("{name}: nobody can read how long its preStop takes: write sleep"));
                }
            };
            let variables = container["env"].as_array().into_iter().flatten();
            read.programs.push(Program {
                grace: grace.map(|grace| ("terminationGracePeriodSeconds".to_owned(), grace)),
                pre_stop,
                sidecars,
                budgets: variables
                    .map(|variable| (text_of(&variable["name"]), text_of(&variable["value"])))
                    .filter(|(name, _)| is_budget(name))
                    .collect(),
                has_companions: has_companions(&container["args"]),
                readiness: probe(&container["readinessProbe"]),
                liveness: probe(&container["livenessProbe"]),
                name,
            });
        }
    }
    Ok(read)
}

/// Init containers that stay, and are sent TERM one after another when the containers have ended.
fn sidecars(containers: &Value, read: &mut Read) -> Duration {
    let mut time = Duration::ZERO;
    for container in containers.as_array().into_iter().flatten() {
        let name = text_of(&container["name"]);
        if container["restartPolicy"] != "Always" {
            read.problems
                .push(format!("{name}: without restartPolicy: Always it is no sidecar, and never ends"));
        }
        if !container["lifecycle"]["preStop"].is_null() {
            read.problems.push(format!("{name}: a sidecar's preStop runs beside the service, not after it"));
        }
        must_be_pid_one(container, read);
        if let Some(Probe { period, failures, .. }) = probe(&container["startupProbe"]) {
            let what = format!(
                "{name}: startupProbe: periodSeconds {} × failureThreshold {failures} =",
                period.as_secs()
            );
            read.least.push(((what, period * failures), "liveness patience", "it kills what is only slow"));
        }
        time += TERM;
    }
    time
}

/// A PgBouncer that others share: its preStop is its plan.
fn of_pooler(container: &Value, grace: Option<Duration>, read: &mut Read) {
    must_be_pid_one(container, read);
    let words = container["lifecycle"]["preStop"]["exec"]["command"].as_array();
    let words: Vec<_> = words.into_iter().flatten().map(text_of).collect();
    let script = match words.as_slice() {
        [shell, option, script] if shell == "sh" && option == "-c" => script.as_str(),
        _ => "",
    };
    let waits = script
        .strip_prefix("sleep ")
        .and_then(|rest| rest.split_once("; kill -INT 1; sleep "))
        .and_then(|(serve, end)| Some((serve.parse().ok()?, end.parse().ok()?)));
    let Some((serve, end)) = waits else {
        let wanted = "sh -c \"sleep N; kill -INT 1; sleep N\"";
        read.problems.push(format!("pgbouncer: preStop is not {wanted}: {words:?}"));
        return;
    };
    let (serve, end) = (Duration::from_secs(serve), Duration::from_secs(end));
    let why = "who has not heard is refused";
    read.least.push((("pgbouncer: preStop: sleep".to_owned(), serve), "endpoint propagation", why));
    if end < INT {
        read.problems.push(format!("pgbouncer: it is sent TERM {end:?} after INT, which has {INT:?}"));
    }
    match grace {
        None => read.problems.push("pgbouncer: nothing says when the platform kills".to_owned()),
        Some(grace) => {
            let left = grace.saturating_sub(serve + end + TERM);
            let what = format!(
                "pgbouncer: preStop {serve:?} + {end:?} and TERM {TERM:?}: terminationGracePeriodSeconds \
                 {grace:?} leaves"
            );
            read.least.push(((what, left), "margin", "killed, with its PID file left"));
        }
    }
}

/// preStop and the kubelet signal PID 1, and a shell that is it passes nothing on.
fn must_be_pid_one(container: &Value, read: &mut Read) {
    let words = container["command"].as_array().into_iter().flatten();
    if !words.map(text_of).any(|word| word.contains("exec pgbouncer ")) {
        let name = text_of(&container["name"]);
        read.problems.push(format!("{name}: its command does not make PgBouncer PID 1"));
    }
}

fn disruption(budget: &Value, documents: &[Value], read: &mut Read) {
    let name = text_of(&budget["metadata"]["name"]);
    let labels = &budget["spec"]["selector"]["matchLabels"];
    let of_it = |document: &&Value| document["spec"]["template"]["metadata"]["labels"] == *labels;
    let replicas = documents.iter().find(of_it).and_then(|document| document["spec"]["replicas"].as_u64());
    let least = budget["spec"]["minAvailable"].as_u64();
    match (replicas, least) {
        (Some(replicas), Some(least)) if least == 0 => {
            read.problems.push(format!("{name}: minAvailable {least} of {replicas} leaves nobody"));
        }
        (Some(replicas), Some(least)) if least >= replicas => {
            read.problems
                .push(format!("{name}: minAvailable {least} of {replicas}: no node could be drained"));
        }
        (Some(_), Some(_)) => {}
        _ => read.problems.push(format!("{name}: minAvailable of no Deployment of this file")),
    }
}

/// With Kubernetes' defaults: every 10 s, three failures, a timeout of 1 s.
fn probe(probe: &Value) -> Option<Probe> {
    probe.is_object().then(|| Probe {
        period: seconds(&probe["periodSeconds"]).unwrap_or(Duration::from_secs(10)),
        failures: probe["failureThreshold"].as_u64().and_then(|count| count.try_into().ok()).unwrap_or(3),
        timeout: seconds(&probe["timeoutSeconds"]).unwrap_or(Duration::from_secs(1)),
    })
}

fn has_companions(args: &Value) -> bool {
    args.as_array().into_iter().flatten().any(|arg| text_of(arg).starts_with("--companion"))
}

fn compose(documents: &[Value]) -> Result<Read, String> {
    let [document] = documents else { return Err("a Compose file is one document".to_owned()) };
    let mut read = Read::default();
    let services = document["services"].as_object().ok_or("there are no services")?;
    for (name, service) in services {
        let given = service["stop_grace_period"].as_str();
        let grace =
            given.map(|text| span(text).ok_or(format!("{name}: stop_grace_period {text} is no time")));
        let grace = grace.transpose()?;
        let Some(grace) = grace else {
            read.problems.push(format!("{name}: without stop_grace_period it is killed after 10 s"));
            continue;
        };
        let check = &service["healthcheck"];
        if check.is_object() {
            let interval = check["interval"].as_str().and_then(span).ok_or(format!("{name}: no interval"))?;
            let retries = check["retries"].as_u64().and_then(|count| u32::try_from(count).ok());
            let retries = retries.ok_or(format!("{name}: no retries"))?;
            let what = format!("{name}: healthcheck: interval {} × retries {retries} =", interval.as_secs());
            read.least.push(((what, interval * retries), "start of a database", "it may replay its journal"));
        }
        if service["build"].is_null() {
            let what = format!("{name}: stop_grace_period");
            read.least.push(((what, grace), "stop of a database", "it writes what it holds"));
            continue;
        }
        let environment = service["environment"].as_object().ok_or(format!("{name}: no environment"))?;
        let variables = environment.iter().map(|(name, value)| (name.clone(), text_of(value)));
        read.programs.push(Program {
            name: name.clone(),
            grace: Some(("stop_grace_period".to_owned(), grace)),
            budgets: variables.filter(|(name, _)| is_budget(name)).collect(),
            has_companions: has_companions(&service["command"]),
            ..Program::default()
        });
    }
    Ok(read)
}

/// A time as systemd and Compose write it, of one part: `60`, `60s`, `500ms`, `1min`, `1m`.
fn span(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().ok()?;
    match unit {
        "" | "s" => Some(Duration::from_secs(number)),
        "ms" => Some(Duration::from_millis(number)),
        "m" | "min" => Some(Duration::from_secs(number * 60)),
        _ => None,
    }
}

/// The settings of a unit in order.
fn unit(text: &str) -> Result<Vec<(&str, &str)>, String> {
    let lines =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';', '[']));
    lines.map(|line| line.split_once('=').ok_or(format!("{line} is no setting"))).collect()
}

fn service(file: &str, settings: &[(&str, &str)]) -> Result<Read, String> {
    let mut read = Read::default();
    let all =
        |name: &'static str| settings.iter().filter(move |(key, _)| *key == name).map(|(_, value)| *value);
    let one = |name| all(name).next_back();
    let time = |name| {
        one(name)
            .map(|text| span(text).ok_or(format!("{name}={text} is no time that is read here")))
            .transpose()
    };
    if one("KillMode") != Some("mixed") {
        read.problems.push("KillMode is not mixed: see the unit's own comment".to_owned());
    }
    if let Some(watchdog) = time("WatchdogSec")? {
        let why = "a machine that swaps is not a runtime that is stuck";
        read.least.push((("WatchdogSec".to_owned(), watchdog), "watchdog", why));
        if one("Type") != Some("notify") {
            read.problems.push("WatchdogSec without Type=notify: nobody would feed it".to_owned());
        }
    }
    if let Some(restart) = time("RestartSec")? {
        let why = "a program that fails at once would be given up after five tries";
        read.least.push((("RestartSec".to_owned(), restart), "pause before a restart", why));
    }
    let variables = all("Environment").filter_map(|pair| pair.split_once('='));
    read.programs.push(Program {
        name: file.to_owned(),
        grace: time("TimeoutStopSec")?.map(|grace| ("TimeoutStopSec".to_owned(), grace)),
        budgets: variables
            .filter(|(name, _)| is_budget(name))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        has_companions: all("ExecStart").any(|command| command.contains("--companion")),
        ..Program::default()
    });
    Ok(read)
}

fn socket(settings: &[(&str, &str)]) -> Result<Read, String> {
    let listens = settings.iter().any(|(key, _)| *key == "ListenStream");
    if listens { Ok(Read::default()) } else { Err("a socket without ListenStream".to_owned()) }
}

fn dockerfile(text: &str) -> Read {
    let mut read = Read::default();
    let instructions = || text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let after = |name: &str| {
        instructions().filter_map(|line| line.strip_prefix(name)).map(str::trim).collect::<Vec<_>>()
    };
    let entries = after("ENTRYPOINT ");
    if entries.is_empty() || entries.iter().any(|entry| !entry.starts_with("[\"/")) {
        read.problems.push("ENTRYPOINT is not in exec form: the program would not hear TERM".to_owned());
    }
    if after("STOPSIGNAL ") != ["SIGTERM"] {
        read.problems.push("STOPSIGNAL is not SIGTERM".to_owned());
    }
    if after("USER ").iter().all(|user| user.starts_with("root") || user.starts_with('0')) {
        read.problems.push("it runs as root".to_owned());
    }
    if instructions().any(|line| line.contains("SHUTDOWN_")) {
        read.problems.push("a budget in the image: it belongs to whoever kills".to_owned());
    }
    read
}
