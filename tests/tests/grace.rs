//! The platform's grace, the plan of a shutdown and the operations page, kept consistent.
//!
//! Whoever kills after a time must leave enough of it for what was promised before. So every file of `deploy/` is read
//! as its platform would, its budgets as the programs would, and the two are compared. What the comparison takes for
//! granted (how long an endpoint takes to be forgotten, …) stands in docs/operations.md and is read from there.

#[path = "grace/files.rs"]
mod files;
#[path = "grace/numbers.rs"]
mod numbers;
#[path = "grace/page.rs"]
mod page;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use shutdown_core::{
    COMPANION_BUDGET, Plan, PlanError, ShutdownConfig, ShutdownCoordinator, Stage, display_duration,
};

use files::{Probe, Program};
use numbers::{Number, numbers};
use page::Page;

/// The directory above this crate's.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace holds this crate")
}

/// Every file below deploy/, by its path from the root.
fn deployed() -> Vec<(String, String)> {
    let mut folders: Vec<PathBuf> = vec![root().join("deploy")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("deploy/ is there").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(root()).expect("it is below").display().to_string();
            found.push((name, std::fs::read_to_string(&path).expect("a text")));
        }
    }
    found.sort();
    found
}

/// What is wrong with a file, each in one sentence that names the file, the thing and the number.
fn law(path: &str, text: &str, page: &Page) -> Vec<String> {
    let read = match files::read(path, text) {
        Ok(read) => read,
        Err(problem) => return vec![format!("{path}: {problem}")],
    };
    let mut problems = read.problems;
    for program in &read.programs {
        problems.extend(of_program(program, page));
    }
    for (what, least, why) in read.least {
        let (name, given) = &what;
        let wanted = page.assumed(least);
        if *given < wanted {
            problems.push(format!("{name} {} is below {}: {why}", shown(*given), shown(wanted)));
        }
    }
    problems.into_iter().map(|problem| format!("{path}: {problem}")).collect()
}

fn shown(duration: Duration) -> String {
    display_duration(duration).to_string()
}

/// The law of one program under one platform.
fn of_program(program: &Program, page: &Page) -> Vec<String> {
    let name = &program.name;
    let mut problems = Vec::new();
    for (variable, _) in &program.budgets {
        if !ShutdownConfig::VARIABLES.contains(&variable.as_str()) {
            problems.push(format!("{name}: there is no {variable}"));
        }
    }
    let given = |variable: &str| {
        let found = program.budgets.iter().find(|(name, _)| name == variable);
        found.map(|(_, value)| value.clone())
    };
    let config = match ShutdownConfig::from_lookup(given) {
        Ok(config) => config,
        Err(error) => return vec![format!("{name}: {error}")],
    };
    let Some((grace_name, grace)) = &program.grace else {
        return vec![format!("{name}: nothing says when the platform kills")];
    };

    let margin = page.assumed("margin");
    let needed = program.pre_stop + config.total + program.sidecars + margin;
    if *grace < needed {
        let sidecars = match program.sidecars {
            Duration::ZERO => String::new(),
            time => format!(" + sidecars {}", shown(time)),
        };
        problems.push(format!(
            "{name}: {grace_name} {} is below preStop {} + SHUTDOWN_TOTAL_TIMEOUT {}{sidecars} + margin {} = {}",
            shown(*grace),
            shown(program.pre_stop),
            shown(config.total),
            shown(margin),
            shown(needed)
        ));
    }
    if config.grace_period != Some(*grace) {
        let said = config.grace_period.map_or("unset".to_owned(), shown);
        problems.push(format!("{name}: SHUTDOWN_GRACE_PERIOD is {said}, {grace_name} is {}", shown(*grace)));
    }

    match in_use(&config, program.has_companions) {
        Err(error) => problems.push(format!("{name}: {error}")),
        Ok(plan) if plan.worst_case() > plan.total => problems.push(format!(
            "{name}: SHUTDOWN_TOTAL_TIMEOUT {} is below the sum of all budgets, {}: some stage has no room",
            shown(plan.total),
            shown(plan.worst_case())
        )),
        Ok(_) => {}
    }

    for (variable, recommended) in page.recommended() {
        let effective = of(&config, variable);
        if effective < recommended {
            problems.push(format!(
                "{name}: {variable}={} is below the {} that docs/operations.md recommends",
                shown(effective),
                shown(recommended)
            ));
        }
    }
    if let Some(probe) = &program.readiness {
        problems.extend(of_readiness(name, probe, config.lame_duck, page));
    }
    if let Some(probe) = &program.liveness {
        let patience = probe.period * probe.failures;
        let wanted = page.assumed("liveness patience");
        if patience < wanted {
            problems.push(format!(
                "{name}: livenessProbe: periodSeconds {} × failureThreshold {} = {} is below {}: it kills what is only slow",
                probe.period.as_secs(),
                probe.failures,
                shown(patience),
                shown(wanted)
            ));
        }
    }
    problems
}

/// The plan with every stage in use that a program can have; companions where it is told of one.
fn in_use(config: &ShutdownConfig, has_companions: bool) -> Result<Plan, PlanError> {
    let stages = Stage::GIVEN.into_iter().filter(|stage| *stage != Stage::Companions || has_companions);
    let builder = ShutdownCoordinator::builder().config(config.clone());
    stages.fold(builder, |builder, stage| builder.stage_task(stage, "in use", async |_| Ok(()))).plan()
}

fn of_readiness(name: &str, probe: &Probe, lame_duck: Duration, page: &Page) -> Vec<String> {
    let mut problems = Vec::new();
    if probe.period.is_zero() {
        problems.push(format!("{name}: readinessProbe: periodSeconds 0 is refused by Kubernetes"));
    }
    if probe.failures < 2 {
        problems.push(format!(
            "{name}: readinessProbe: failureThreshold {}: one probe that is lost takes a healthy pod away",
            probe.failures
        ));
    }
    let seen = probe.period * probe.failures + probe.timeout + page.assumed("endpoint propagation");
    if lame_duck < seen {
        problems.push(format!(
            "{name}: SHUTDOWN_LAME_DUCK {} is below the {} that a red readiness needs to be seen: {} × {}, the probe's \
             timeout {}, endpoint propagation {}",
            shown(lame_duck),
            shown(seen),
            shown(probe.period),
            probe.failures,
            shown(probe.timeout),
            shown(page.assumed("endpoint propagation"))
        ));
    }
    problems
}

/// The effective value of a variable that is a time.
fn of(config: &ShutdownConfig, variable: &str) -> Duration {
    match variable {
        "SHUTDOWN_LAME_DUCK" => config.lame_duck,
        "SHUTDOWN_LINGER" => config.linger,
        "SHUTDOWN_GRACEFUL_TIMEOUT" => config.graceful,
        "SHUTDOWN_DEPARTURE_TIMEOUT" => config.departure,
        "SHUTDOWN_BACKGROUND_TIMEOUT" => config.background,
        "SHUTDOWN_WEBSOCKET_TIMEOUT" => config.websocket,
        "SHUTDOWN_CACHE_TIMEOUT" => config.cache,
        "SHUTDOWN_DB_TIMEOUT" => config.database,
        "SHUTDOWN_COMPANION_TIMEOUT" => config.companion.unwrap_or(COMPANION_BUDGET),
        "SHUTDOWN_TOTAL_TIMEOUT" => config.total,
        "SHUTDOWN_SESSION_WINDOW" => config.session_window,
        "SHUTDOWN_GRACE_PERIOD" => config.grace_period.unwrap_or_default(),
        other => panic!("{other} is no time: this list must know it"),
    }
}

#[test]
fn every_file_of_deploy_leaves_the_shutdown_the_time_it_was_promised() {
    let page = Page::read();
    let files = deployed();
    let programs: usize = files
        .iter()
        .map(|(path, text)| files::read(path, text).unwrap_or_else(|problem| panic!("{path}: {problem}")))
        .map(|read| read.programs.len())
        .sum();
    assert_eq!(
        programs, 7,
        "two programs under three platforms, and one of them with a sidecar, are looked at"
    );
    let problems: Vec<_> = files.iter().flat_map(|(path, text)| law(path, text, &page)).collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn every_number_of_deploy_that_is_made_too_small_is_named() {
    let page = Page::read();
    let mut tried = 0;
    let mut excused = std::collections::BTreeSet::new();
    for (path, text) in deployed() {
        if files::has_no_times(&path) {
            continue;
        }
        for number in numbers(&path, &text) {
            if let Some(key) = number.excuse() {
                excused.insert(key);
                continue;
            }
            tried += 1;
            let Number { line, key, digits, .. } = &number;
            let less =
                number.less().unwrap_or_else(|| panic!("{path}:{line}: {key} {digits} cannot be less"));
            let problems = law(&path, &number.replaced(&text, less), &page);
            let less = less.to_string();
            let named = problems.iter().any(|problem| {
                let words = problem.split(|c: char| !c.is_ascii_alphanumeric());
                let digits = |word: &str| word.trim_end_matches(char::is_alphabetic) == less;
                problem.starts_with(&path) && words.into_iter().any(digits)
            });
            assert!(named, "{path}:{line}: {key} {digits} made {less}, and nobody says so: {problems:?}");
        }
    }
    println!("{tried} numbers made smaller, each named; excused: {excused:?}");
    assert!(tried >= 50, "only {tried} numbers were found");
    let stale: Vec<_> = numbers::EXCUSED.iter().filter(|(key, _)| !excused.contains(key)).collect();
    assert!(stale.is_empty(), "excused, and not there: {stale:?}");
}

#[test]
fn what_does_not_fit_or_cannot_be_read_is_red_and_says_what_it_is() {
    let page = Page::read();
    let unknown = law("deploy/nomad/edge-proxy.hcl", "", &page);
    assert!(unknown[0].starts_with("deploy/nomad/edge-proxy.hcl: a file of no kind"), "{unknown:?}");
    let path = "deploy/kubernetes/edge-proxy.yaml";
    let text = std::fs::read_to_string(root().join(path)).expect("it is there");
    let env = "          env:\n";
    let exec =
        format!("          lifecycle: {{ preStop: {{ exec: {{ command: [sleep, \"5\"] }} }} }}\n{env}");
    let sleep = format!("          lifecycle: {{ preStop: {{ sleep: {{ seconds: 5 }} }} }}\n{env}");
    let broken = [
        ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 59", "margin 2s = 60s"),
        ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 61", "PERIOD is 60s"),
        ("      terminationGracePeriodSeconds: 60\n", "", "nothing says when"),
        // Its time would count and is not known; it counts, and 60 is no longer enough.
        (env, &exec, "preStop takes"),
        (env, &sleep, "preStop 5s + SHUTDOWN_TOTAL_TIMEOUT 58s + margin 2s = 65s"),
        ("SHUTDOWN_TOTAL_TIMEOUT, value: \"58\"", "SHUTDOWN_TOTAL_TIMEOUT, value: \"5\"", "impossible"),
        ("SHUTDOWN_GRACEFUL_TIMEOUT, value: \"30\"", "SHUTDOWN_GRACEFUL_TIMEOUT, value: \"31\"", "no room"),
        ("SHUTDOWN_DB_TIMEOUT, value: \"3\"", "SHUTDOWN_DB_TIMEOUT, value: \"3m\"", "not a duration"),
        ("SHUTDOWN_DB_TIMEOUT", "SHUTDOWN_DATABASE_TIMEOUT", "there is no SHUTDOWN_DATABASE_TIMEOUT"),
        ("periodSeconds: 1\n", "periodSeconds: 2\n", "readiness needs to be seen"),
        ("failureThreshold: 2\n", "failureThreshold: 3\n", "readiness needs to be seen"),
        ("path: /readyz", "path: /livez", "readinessProbe does not ask /readyz"),
    ];
    for (from, to, what) in broken {
        assert!(text.contains(from), "{from}");
        let problems = law(path, &text.replacen(from, to, 1), &page);
        assert!(problems.iter().any(|problem| problem.contains(what)), "{to}: {problems:?}");
    }
}

#[test]
fn a_pooler_that_would_be_killed_early_or_told_twice_is_red() {
    let page = Page::read();
    let pooler = "deploy/pgbouncer/kubernetes/pgbouncer.yaml";
    let sidecar = "deploy/pgbouncer/kubernetes/app-with-sidecar.yaml";
    let hook = "sleep 3; kill -INT 1; sleep 20";
    let policy = "          restartPolicy: Always\n";
    let with_hook = format!(
        "{policy}          lifecycle: {{ preStop: {{ exec: {{ command: [sh, -c, \"{hook}\"] }} }} }}\n"
    );
    let broken = [
        (pooler, "terminationGracePeriodSeconds: 30", "terminationGracePeriodSeconds: 29", "29s leaves 1s"),
        // As the guide that we come from, and as its older manifest.
        (pooler, hook, "psql -c PAUSE; sleep 30", "preStop is not"),
        (pooler, hook, "killall -INT pgbouncer && sleep 5", "preStop is not"),
        (pooler, hook, "sleep 3; kill -INT 1; sleep 1", "is sent TERM 1s after INT"),
        (pooler, hook, "sleep 3; kill -TERM 1; sleep 20", "preStop is not"),
        (pooler, " && exec pgbouncer", " && pgbouncer", "PID 1"),
        (pooler, "minAvailable: 1", "minAvailable: 2", "no node could be drained"),
        (pooler, "replicas: 2", "replicas: 1", "no node could be drained"),
        (sidecar, "terminationGracePeriodSeconds: 65", "terminationGracePeriodSeconds: 60", "sidecars 5s"),
        (sidecar, policy, &with_hook, "runs beside the service"),
        (sidecar, policy, "", "is no sidecar"),
    ];
    for (path, from, to, what) in broken {
        let text = std::fs::read_to_string(root().join(path)).expect("it is there");
        assert!(text.contains(from), "{from}");
        let problems = law(path, &text.replacen(from, to, 1), &page);
        assert!(problems.iter().any(|problem| problem.contains(what)), "{to}: {problems:?}");
    }
}

#[test]
fn the_operations_page_gives_the_defaults_that_the_code_has_and_its_sums_are_right() {
    let page = Page::read();
    let defaults = page.defaults();
    let names: Vec<_> = defaults.iter().map(|(name, _)| name.as_str()).collect();
    for variable in ShutdownConfig::VARIABLES {
        assert!(names.contains(variable), "docs/operations.md does not list {variable}");
    }
    let read = ShutdownConfig::from_lookup(|name| {
        let (_, value) = defaults.iter().find(|(variable, _)| variable == name)?;
        (value != "unknown").then(|| value.clone())
    });
    let mut code = ShutdownConfig::default();
    // Not given, it follows the ladders, and is this without any.
    code.companion = Some(COMPANION_BUDGET);
    assert_eq!(read, Ok(code), "docs/operations.md has another default");
    assert!(page.sums() >= 5, "sums are written as a + b = c");

    let recommended = page.recommended();
    let set = |name: &str| {
        let (_, time) = recommended.iter().find(|(variable, _)| *variable == name)?;
        Some(shown(*time))
    };
    let config = ShutdownConfig::from_lookup(set).expect("what is recommended can be used");
    let sum = in_use(&config, false).expect("what is recommended is possible").worst_case().as_secs_f64();
    assert!(page.says(&format!("= {sum}")), "docs/operations.md does not say that the sum is {sum}");
}

#[test]
fn the_operations_page_names_only_metrics_that_there_are() {
    let page = Page::read();
    let code =
        std::fs::read_to_string(root().join("shutdown-tower/src/admin/metrics.rs")).expect("the metrics");
    let metrics = page.metrics();
    assert!(metrics.len() >= 8, "{metrics:?}");
    for metric in metrics {
        assert!(
            code.contains(&format!("\"{metric}\"")),
            "docs/operations.md names {metric}, which nobody exports"
        );
    }
}

#[test]
fn systemd_finds_nothing_to_say_about_the_units() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut units = Vec::new();
    for (path, text) in deployed().into_iter().filter(|(path, _)| path.starts_with("deploy/systemd/")) {
        let unit = dir.path().join(Path::new(&path).file_name().expect("a file"));
        // It looks whether the program is there.
        let text = text.replace("ExecStart=/usr/bin/", &format!("ExecStart={}/", programs().display()));
        std::fs::write(&unit, text).expect("a temporary file");
        units.push(unit);
    }
    let verify = |units: &[PathBuf]| {
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units).output();
        let output = output.expect("systemd-analyze is installed: run tests/run, which installs it");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert_eq!(verify(&units), "");
    let text = std::fs::read_to_string(&units[0]).expect("it was written");
    std::fs::write(&units[0], text.replace("KillMode=mixed", "KillMode=some")).expect("a temporary file");
    assert!(verify(&units).contains("kill mode"), "it would say so");
}

/// Where the built programs are.
fn programs() -> PathBuf {
    let program = shutdown_tests::process::binary("edge-proxy");
    program.parent().expect("a file is in a directory").to_owned()
}
