//! Who only seems to be a companion gets no signal from the edge proxy: another process that has its number by now, another user's;
//! and where the system has no pidfds, it is not otherwise.
//!
//! Needs unshare and setpriv of util-linux and user namespaces, or root; and strace.

use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{get, status_until};
use shutdown_tests::companions::{Lab, Running, told, until, writes_down_signals};
use shutdown_tests::process::{EdgeProxy, Process, read_report};
use shutdown_tests::servers::{as_user, dir_of};

/// The companion's own name.
const NAME: &str = "pgbouncer";
const NOBODY: &str = "nobody";

/// In a namespace of processes: a companion that is killed and leaves its PID file, its number given to another, the edge proxy
/// beside that, and the control. `$1`: the edge proxy, `$2`: the lab; then its arguments.
const REUSE: &str = r#"
    proxy=$1 lab=$2; shift 2
    # Starts a program as the process of this number.
    as_number() {
        local wanted=$1; shift
        for _ in {1..50}; do
            echo $((wanted - 1)) > /proc/sys/kernel/ns_last_pid || exit 3
            "$@" >/dev/null 2>&1 &
            (($! == wanted)) && return
            kill -KILL $!; wait $! 2>/dev/null
        done
        echo "nobody could be given the number $wanted" >&2; exit 3
    }
    # The companion's end, after which only its PID file is left.
    leave_file() {
        as_number 1000 "$lab/pgbouncer" 300
        echo 1000 > "$lab/pid"
        kill -KILL 1000; wait 1000 2>/dev/null
    }
    beside() {
        "$proxy" "$@" > "$lab/out" & local running=$!
        until grep -q '  admin ' "$lab/out"; do sleep 0.02; done
        kill -TERM $running; wait $running
        echo "code $?"
        kill -0 1000 && echo "1000 lives: $(</proc/1000/comm)"
        cp data/last-shutdown.json "$lab/$case.json"
    }
    for case in stranger younger; do
        leave_file
        if [[ $case == stranger ]]; then as_number 1000 "$lab/stranger" 300; else as_number 1000 "$lab/pgbouncer" 300; fi
        # Written a minute ago, by the companion before.
        [[ $case == stranger ]] || touch -d '1 minute ago' "$lab/pid"
        echo "== $case"
        beside "$@"
        kill $(<"$lab/pid"); wait 1000 2>/dev/null
        kill -0 1000 2>/dev/null || echo "control: 1000 is dead"
    done
"#;

#[test]
fn a_number_that_was_given_to_another_since_ends_nobody() {
    let lab = Lab::new();
    lab.sleeper(NAME);
    lab.sleeper("stranger");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let proxy = EdgeProxy::command(dir.path());
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]);
    command.args(["bash", "-c", REUSE, "bash"]).arg(proxy.get_program()).arg(lab.path());
    command
        .args(proxy.get_args())
        .args(["--companion", &format!("name={NAME},pidfile={}", lab.at("pid").display())]);
    let mut process = Process::start(command.current_dir(dir.path()));
    let code = process.exit_code(PATIENCE);
    let (stdout, stderr) = (process.stdout(), process.stderr());
    println!("{stdout}");
    assert_eq!(code, 0, "{stderr}");
    for (case, called, why) in [
        ("stranger", "stranger", "process 1000 is called stranger"),
        ("younger", NAME, "after its PID file was written"),
    ] {
        let part = stdout.split("== ").find_map(|part| part.strip_prefix(case)).expect("it came so far");
        let expected = format!("code 10\n1000 lives: {called}\ncontrol: 1000 is dead");
        assert_eq!(part.trim(), expected, "{stderr}");
        let report = std::fs::read(lab.at(&format!("{case}.json"))).expect("it was copied");
        refused(&serde_json::from_slice(&report).expect("a report is JSON"), why);
    }
}

#[track_caller]
fn refused(report: &Value, why: &str) {
    let told = told(report, NAME);
    assert_eq!(
        (&told["outcome"], &told["note"]["outcome"]),
        (&"failed".into(), &"refused".into()),
        "{report:#}"
    );
    let detail = told["detail"].as_str().unwrap_or_default();
    assert!(detail.contains(why) && detail.contains("no signal was sent"), "{why} is not in {detail:?}");
}

/// A companion that writes down its signals, and its PID file.
fn companion(lab: &Lab) -> (Running, String) {
    let program = lab.script(NAME, &writes_down_signals("exit 0"));
    let running = Running::start(Command::new(program).arg(lab.path()));
    lab.lines_when("ready", 1);
    let file = lab.pid_file("pid", running.id());
    (running, format!("name={NAME},pidfile={}", file.display()))
}

/// A life of an edge-proxy with this companion under strace: its exit code, and its calls that signal a process or hold one.
fn traced(inject: Option<&str>, user: Option<&str>, spec: &str) -> (i32, Value, Vec<String>) {
    let dir = user.map_or_else(|| tempfile::tempdir().expect("a temporary directory"), dir_of);
    let trace = tempfile::NamedTempFile::new().expect("a temporary file");
    let proxy = EdgeProxy::command(dir.path());
    let program = Path::new(proxy.get_program());
    let plain = user.map_or_else(|| Command::new(program), |user| as_user(user, program));
    let mut strace = Command::new("strace");
    // -D: it is the program that is our child, and strace that is somewhere else.
    strace.args(["-D", "-f", "-e", "trace=kill,tkill,tgkill,rt_sigqueueinfo,pidfd_open,pidfd_send_signal"]);
    strace.args(inject.map(|inject| format!("--inject={inject}"))).arg("-o").arg(trace.path());
    strace.arg(plain.get_program()).args(plain.get_args()).args(proxy.get_args()).args(["--companion", spec]);
    let mut process = Process::start(strace.current_dir(dir.path()));
    process.stdout_line(|line| line.contains("  admin "));
    process.signal(Signal::TERM);
    let code = process.exit_code(PATIENCE);
    // strace holds stderr as well: it has ended, and its file is whole.
    process.stderr();
    let trace = std::fs::read_to_string(trace.path()).expect("strace has written it");
    let calls = trace.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim().to_owned()));
    let calls =
        calls.filter(|call| call.split_once('(').is_some_and(|(name, _)| !name.contains(' '))).collect();
    println!("{calls:#?}");
    (code, read_report(&dir.path().join("data")), calls)
}

/// Those that are no look at the process, which is held at the start as well, to be able to warn; nor the question whether it might
/// be signalled, which is signal 0.
fn signals(calls: &[String]) -> Vec<&str> {
    let is_question = |call: &str| call.split(')').next().is_some_and(|args| args.ends_with(", 0"));
    let (looks, signals): (Vec<&str>, _) = calls.iter().map(|call| &**call).partition(|call| {
        call.starts_with("pidfd_open(") || (call.starts_with("kill(") && is_question(call))
    });
    assert!(!looks.is_empty(), "it was not even looked at: {calls:?}");
    signals
}

#[test]
fn another_users_companion_is_refused_and_gets_no_signal() {
    if !geteuid().is_root() {
        println!("not run: only root has processes of another user");
        return;
    }
    let lab = Lab::new();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(lab.path(), open).expect("it is ours");
    let (mut running, spec) = companion(&lab);
    let (code, report, calls) = traced(None, Some(NOBODY), &spec);
    assert_eq!(code, 10, "{report:#}");
    refused(&report, "belongs to user 0, and this process may not signal it");
    assert_eq!(signals(&calls), [""; 0]);
    assert!(running.is_alive());
    assert_eq!(lab.lines("signals"), [""; 0]);

    let (code, report, calls) = traced(None, None, &spec);
    assert_eq!((code, &told(&report, NAME)["note"]["outcome"]), (0, &"exited".into()), "{report:#}");
    let sent = signals(&calls);
    assert!(
        matches!(sent[..], [one] if one.starts_with("pidfd_send_signal(")),
        "control: its own user's gets one: {sent:?}"
    );
    assert!(!running.is_alive());
    assert_eq!(lab.lines("signals"), [format!("{} INT", running.id())]);
}

#[test]
fn without_pidfds_a_companion_is_ended_all_the_same_and_a_stranger_is_not() {
    const NO_PIDFDS: Option<&str> = Some("pidfd_open:error=ENOSYS");
    let lab = Lab::new();
    let (mut running, spec) = companion(&lab);
    let (code, report, calls) = traced(NO_PIDFDS, None, &spec);
    assert_eq!((code, &told(&report, NAME)["note"]["outcome"]), (0, &"exited".into()), "{report:#}");
    let sent = signals(&calls);
    let by_number = format!("kill({}, SIGINT)", running.id());
    assert!(matches!(sent[..], [one] if one.starts_with(&by_number)), "one signal, by number: {sent:?}");
    let looks = calls.iter().filter(|call| call.starts_with("pidfd_open("));
    assert!(looks.into_iter().all(|look| look.contains("ENOSYS")), "{calls:?}");
    assert!(!running.is_alive());
    assert_eq!(lab.lines("signals").len(), 1);

    let mut stranger = Running::start(Command::new(lab.sleeper("stranger")).arg("300"));
    lab.pid_file("pid", stranger.id());
    let (code, report, calls) = traced(NO_PIDFDS, None, &spec);
    assert_eq!(code, 10, "{report:#}");
    refused(&report, "is called stranger");
    assert_eq!(signals(&calls), [""; 0]);
    assert!(stranger.is_alive());
}

/// The children of a process: their states and numbers.
fn children(of: u32) -> Vec<(char, u32)> {
    let processes = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let stats = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let child = |stat: String| {
        // `pid (name) state ppid …`, and a name may hold anything (proc(5)).
        let (head, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?.chars().next()?;
        (fields.next()? == of.to_string()).then_some((state, head.split_once(' ')?.0.parse().ok()?))
    };
    stats.filter_map(child).collect()
}

#[test]
fn as_process_1_with_reap_the_exit_code_of_what_it_has_launched_is_known_and_no_zombie_stays() {
    let lab = Lab::new();
    // Its first three lives end at once, and leave an orphan behind that ends a moment later.
    let script = "echo $$ >> \"$1/starts\"; setsid sleep 0.1 >/dev/null 2>&1 & \
                  [[ $(wc -l < \"$1/starts\") == 4 ]] || exit 7; exec \"$1/worker\" 300";
    let launcher = lab.script("launcher", script);
    lab.sleeper("worker");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let proxy = EdgeProxy::command(dir.path());
    // Every wait for a child takes long: whoever waits for orphans comes before who waits for the companion, which takes more
    // than one. strace is outside, and no child of anybody here.
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-o", "/dev/null", "-e", "trace=waitid", "--inject=waitid:delay_enter=50000"]);
    command.args(["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]);
    command.arg(proxy.get_program()).args(proxy.get_args()).args(["--reap", "--companion"]);
    command.arg(format!("name=worker,launch={} {}", launcher.display(), lab.path().display()));
    let mut process = Process::start(command.current_dir(dir.path()));
    let admin = process.address("  admin ");
    let shown = status_until(admin, |status| {
        status["companions"][0]["restarts"] == 3 && !status["companions"][0]["pid"].is_null()
    });
    assert_eq!(shown["companions"][0]["last_exit"], "exited with code 7", "{shown:#}");
    // The fork of unshare is there before what it prints is.
    let [(_, inner)] = children(process.id())[..] else { panic!("{}", process.stderr_so_far()) };
    until(|| matches!(children(inner)[..], [('S', _)]), &|| format!("{:?}", children(inner)));
    assert_eq!(lab.lines("starts").len(), 4);
    assert_eq!(get(admin, "/livez").expect("it runs").status, 200);
    let pid = Pid::from_raw(inner.try_into().expect("a number")).expect("not zero");
    kill_process(pid, Signal::TERM).expect("it runs");
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let report = read_report(&dir.path().join("data"));
    let told = told(&report, "worker");
    assert_eq!(
        (&told["note"]["outcome"], &told["note"]["ended_by"]),
        (&"exited".into(), &15.into()),
        "{report:#}"
    );
}
