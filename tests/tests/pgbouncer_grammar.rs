//! The readers and editors of PgBouncer's files agree with PgBouncer itself, on each version that can be had.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use shutdown_pgbouncer::{
    Connection, DatabaseName, Ini, Problem, Secret, UserName, Userlist, Version, check,
};
use shutdown_tests::servers::{Installed, missing_pgbouncers, pgbouncers};

/// A database: its name, host, port, and what it is called at the server.
type Row = (&'static str, &'static str, &'static str, &'static str);

/// What becomes of a file.
#[derive(Clone, Copy)]
enum Expect {
    /// It is refused.
    Refused,
    /// It is read, and has these databases.
    Read(&'static [Row]),
    /// Refused before this version, read from it on.
    From((u32, u32), &'static [Row]),
    /// Read before this version, refused from it on.
    Until((u32, u32), &'static [Row]),
}

use Expect::{From, Read, Refused, Until};

const A: &[Row] = &[("a", "h", "5432", "a")];
const NONE: &[Row] = &[];
const LONGEST: &str = "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn";

/// Files as they are given to PgBouncer: `{P}` is what it needs to start.
const INI: &[(&str, Expect)] = &[
    // Sections.
    ("", Refused),
    ("[databases]\na = host=h\n", Refused),
    ("[pgbouncer]\n{P}", Read(NONE)),
    ("[pgbouncer]\n{P}[databases]\na = host=h\n", Read(A)),
    (
        "[pgbouncer]\n{P}[databases]\na = host=h\n[databases]\nb =\n",
        Read(&[("a", "h", "5432", "a"), ("b", "", "5432", "b")]),
    ),
    ("[pgbouncer]\n{P}[DATABASES]\na = host=h\n", Refused),
    ("[pgbouncer]\n{P}[bogus]\n", Refused),
    ("[pgbouncer]\n{P}[databases\na = host=h\n", Refused),
    ("[pgbouncer]\n{P}[ databases ]\n", Refused),
    ("[pgbouncer]\n{P}[databases] a = host=h\n", Read(A)),
    ("[pgbouncer]\n{P}[databases] [users] [databases] a = host=h\n", Read(A)),
    ("[pgbouncer]\n{P}[databases] ; c\na = host=h\n", Read(A)),
    ("a = host=h\n[pgbouncer]\n{P}", Refused),
    ("[peers]\n1 = host=h port=1\n[pgbouncer]\n{P}", From((1, 19), NONE)),
    ("[peers]\n0 = host=h\n[pgbouncer]\n{P}", Refused),
    ("[peers]\n65536 = host=h\n[pgbouncer]\n{P}", Refused),
    ("[peers]\n1 = port=1\n[pgbouncer]\n{P}", Refused),
    ("[users]\nu = pool_mode=Session max_user_connections=x\n[pgbouncer]\n{P}", Read(NONE)),
    ("[users]\nu = bogus=1\n[pgbouncer]\n{P}", Refused),
    ("[users]\nu = pool_size=1\n[pgbouncer]\n{P}", From((1, 24), NONE)),
    ("[users]\nu = transaction_timeout=1\n[pgbouncer]\n{P}", From((1, 25), NONE)),
    // Lines.
    ("; c\n  # c\n\n \t[pgbouncer]\n{P}[databases]\n\t a\t=\thost=h \t\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\r\na = host=h\r\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h ; c\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h # c\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h \\\n port=1\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na : host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h\n\0b = host=h\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na\0 = host=h\n", Refused),
    ("\u{feff}[pgbouncer]\n{P}", Refused),
    // Names.
    ("[pgbouncer]\n{P}[databases]\n= host=h\n", Read(&[("", "h", "5432", "")])),
    ("[pgbouncer]\n{P}[databases]\nA-0_b.c = host=h\n", Read(&[("A-0_b.c", "h", "5432", "A-0_b.c")])),
    ("[pgbouncer]\n{P}[databases]\n'a' = host=h\n", From((1, 25), A)),
    ("[pgbouncer]\n{P}[databases]\n'a b\nc' = host=h\n", From((1, 25), &[("a b\nc", "h", "5432", "a b\nc")])),
    ("[pgbouncer]\n{P}[databases]\n'a''b' = host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\n'' = host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\n\"a\" = host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\nü = host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na@b = host=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\npgbouncer = host=h\n", Refused),
    (
        "[pgbouncer]\n{P}[databases]\nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn =\n",
        Read(&[(LONGEST, "", "5432", LONGEST)]),
    ),
    (
        "[pgbouncer]\n{P}[databases]\nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn =\n",
        Refused,
    ),
    ("[pgbouncer]\n{P}[databases]\na = host=x port=1\na = host=h\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\n* = host=h\n", Read(NONE)),
    ("[pgbouncer]\n{P}[databases]\n* = bogus\n", Read(NONE)),
    // Connection strings.
    ("[pgbouncer]\n{P}[databases]\na =\n", Read(&[("a", "", "5432", "a")])),
    (
        "[pgbouncer]\n{P}[databases]\na = host = h  port =  1  dbname='it''s a'\n",
        Read(&[("a", "h", "1", "it's a")]),
    ),
    ("[pgbouncer]\n{P}[databases]\na = host=it's\n", Read(&[("a", "it's", "5432", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host==h\n", Read(&[("a", "=h", "5432", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host=h\tdbname=x\n", Read(&[("a", "h\tdbname=x", "5432", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host='h'xport=1\n", Read(&[("a", "h", "1", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host='h'port=1\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host='h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=''\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = bogus=1\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = HOST=h\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=x host=h\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=abc\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=0\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=4294967296\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=54x\n", Read(&[("a", "h", "54", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=99999\n", Read(&[("a", "h", "99999", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=-5\n", Read(&[("a", "h", "-5", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host=h port=4294967297\n", Read(&[("a", "h", "1", "a")])),
    ("[pgbouncer]\n{P}[databases]\na = host=h pool_size=abc\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h pool_mode=Transaction\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h pool_mode=x\n", Refused),
    ("[pgbouncer]\n{P}[databases]\na = host=h reserve_pool=1\n", Read(A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h reserve_pool_size=1\n", From((1, 24), A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h load_balance_hosts=Round-Robin\n", From((1, 24), A)),
    ("[pgbouncer]\n{P}[databases]\na = host=h load_balance_hosts=x\n", Refused),
    (
        "[pgbouncer]\n{P}[databases]\na = host=h auth_query=x auth_dbname=y max_db_client_connections=1 server_lifetime=abc\n",
        From((1, 24), A),
    ),
    (
        "[pgbouncer]\n{P}[databases]\na = host=h user=u password=p auth_user=u client_encoding=x datestyle=x timezone=x application_name=x \
         connect_query='x y' min_pool_size=1 max_db_connections=1\n",
        Read(A),
    ),
    // Parameters.
    ("[pgbouncer]\n{P}bogus = 1\n", Refused),
    ("[pgbouncer]\n{P}Pool_mode = session\n", Refused),
    ("[pgbouncer]\n{P}pool_mode = Session\n", Read(NONE)),
    ("[pgbouncer]\n{P}pool_mode = x\n", Refused),
    ("[pgbouncer]\n{P}default_pool_size = 0x10\n", Read(NONE)),
    ("[pgbouncer]\n{P}default_pool_size = 08\n", Refused),
    ("[pgbouncer]\n{P}default_pool_size = 20 ; c\n", Refused),
    ("[pgbouncer]\n{P}default_pool_size =\n", Refused),
    ("[pgbouncer]\n{P}stats_period = 99999999999999999999\n", Read(NONE)),
    ("[pgbouncer]\n{P}query_timeout = 1.5\n", Read(NONE)),
    ("[pgbouncer]\n{P}query_timeout = -1\n", Refused),
    ("[pgbouncer]\n{P}query_timeout = 1e400\n", Refused),
    ("[pgbouncer]\n{P}server_reset_query = DISCARD ALL; -- x\n", Read(NONE)),
    ("[pgbouncer]\n{P}auth_type = peer\n", Refused),
    ("[pgbouncer]\n{P}suspend_timeout = 1\n", Until((1, 26), NONE)),
    ("[pgbouncer]\n{P}peer_id = 1\n", From((1, 19), NONE)),
    ("[pgbouncer]\n{P}transaction_timeout = 1\n", From((1, 25), NONE)),
    // Included files.
    ("%include\n[pgbouncer]\n{P}", Refused),
    ("%include \n[pgbouncer]\n{P}", Refused),
    ("%includes x\n[pgbouncer]\n{P}", Refused),
    ("[pgbouncer]\n{P}[databases]\n%include\t/dev/null \na = host=h\n", Read(A)),
];

/// A user and a password.
type Login = (&'static str, &'static str);

/// Userlists, the logins that get in, and those that do not.
const USERLISTS: &[(&str, &[Login], &[Login])] = &[
    ("\"a\" \"x\"\n\"z\" \"z\"\n", &[("a", "x"), ("z", "z")], &[("a", "y"), ("b", "x")]),
    ("", &[], &[("z", "z")]),
    (" \t; c\r\n \x0b\"a\" \"x\"\r\n\n\"z\"\t\"z\"", &[("a", "x"), ("z", "z")], &[]),
    ("# c\n\"z\" \"z\"\n", &[], &[("z", "z")]),
    ("\"a\" \"x\"\nb \"x\"\n\"z\" \"z\"\n", &[("a", "x")], &[("z", "z")]),
    ("\"a\" \"x\" \"q\" ; tail\n\"z\" \"z\"\n", &[("a", "x"), ("z", "z")], &[("a", "q")]),
    ("\"a\"\"b\" \"x\"\"y\"\n\"c\" \"\"\"\"\n", &[("a\"b", "x\"y"), ("c", "\"")], &[]),
    ("\"a\\\" \"x\\\"\n\"z\" \"z\"\n", &[("a\\", "x\\"), ("z", "z")], &[]),
    ("\"ü\" \"ß\"\n\"z\" \"z\"", &[("ü", "ß"), ("z", "z")], &[]),
    ("\"a\" \"\"\n\"z\" \"z\"\n", &[("z", "z")], &[("a", ""), ("a", "x")]),
    ("\"a\" \"x\"\n\"a\" \"y\"\n", &[("a", "y")], &[("a", "x")]),
    ("\"a\" \"x\ny\"\n\"z\" \"z\"\n", &[("a", "x\ny"), ("z", "z")], &[]),
    ("\"a\"x\"p\"\n\"z\" \"z\"\n", &[("a", "p"), ("z", "z")], &[]),
    ("\"a\"\n\"b\" \"x\"\n\"z\" \"z\"\n", &[("a", "b"), ("z", "z")], &[("b", "x")]),
    ("\"q\" \"q\"\n\"a \"x\"\n\"z\" \"z\"\n\"y\" \"y\"\n", &[("q", "q"), ("y", "y")], &[("z", "z")]),
    ("\"q\" \"q\"\0\n\"z\" \"z\"\n", &[("q", "q")], &[("z", "z")]),
    ("\"q\" \"q\"\n\"a\" x\n", &[("q", "q")], &[("a", "x")]),
    ("\"q\" \"q\"\n\"z\" \"z\n", &[("q", "q")], &[("z", "z")]),
    ("\"pgbouncer\" \"x\"\n\"z\" \"z\"\n", &[("pgbouncer", "x"), ("z", "z")], &[]),
];

/// Runs a law on each version for each case, two at a time; the cases for which it did not hold.
fn on_each_version<C: Sync>(cases: &[C], law: impl Fn(&Installed, Version, &C) -> Result<(), String> + Sync) {
    let installed = pgbouncers();
    let jobs = Mutex::new(installed.iter().flat_map(|version| cases.iter().map(move |case| (version, case))));
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((installed, case)) = jobs.lock().expect("nobody panics with it").next() else {
                        return;
                    };
                    let version = installed.version().parse().expect("a version");
                    if let Err(why) = law(installed, version, case) {
                        wrong.lock().expect("nobody panics with it").push(format!("{installed}: {why}"));
                    }
                }
            });
        }
    });
    let versions: Vec<_> = installed.iter().map(ToString::to_string).collect();
    println!("{} cases on {}", cases.len(), versions.join(", "));
    for line in missing_pgbouncers().lines() {
        println!("not run on {line}");
    }
    let wrong = wrong.into_inner().expect("nobody panicked");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?}, not {wanted:?}")) }
}

/// Host, port and name at the server, by the database.
type Databases = BTreeMap<String, (String, String, String)>;

/// What PgBouncer takes a file for, as far as we read it.
fn read(ini: &Ini) -> Databases {
    let databases = ini.databases().into_iter().filter(|database| database.name != "*");
    databases
        .map(|database| {
            let connection = database.connection.expect("it is accepted");
            let port = connection.number("port").unwrap_or(5432).to_string();
            let host = connection.get("host").unwrap_or_default().to_owned();
            let called = connection.get("dbname").unwrap_or(&database.name).to_owned();
            (database.name, (host, port, called))
        })
        .collect()
}

fn fatal(problems: &[Problem]) -> Vec<String> {
    problems.iter().filter(|problem| problem.fatal).map(ToString::to_string).collect()
}

#[test]
fn a_file_is_refused_and_read_as_pgbouncer_does() {
    on_each_version(INI, |installed, version, (text, expect)| {
        let at = |(major, minor)| Version { major, minor };
        let wanted = match *expect {
            Refused => None,
            Read(rows) => Some(rows),
            From(first, rows) => (version >= at(first)).then_some(rows),
            Until(first, rows) => (version < at(first)).then_some(rows),
        };
        let wanted: Option<Databases> = wanted.map(|rows| {
            let own = |text: &str| text.to_owned();
            rows.iter()
                .map(|(name, host, port, called)| (own(name), (own(host), own(port), own(called))))
                .collect()
        });
        let shown = installed.start_file(&with_any(text), b"").ok().map(|pgbouncer| {
            let rows =
                pgbouncer.console("SHOW DATABASES").into_iter().filter(|row| row["name"] != "pgbouncer");
            rows.map(|mut row| {
                let mut take = |column| row.remove(column).expect("all versions have it");
                (take("name"), (take("host"), take("port"), take("database")))
            })
            .collect::<Databases>()
        });
        equal(&format!("{text:?} is by PgBouncer read as"), &shown, &wanted)?;
        let ini = Ini::new(*text);
        // What it needs to start is no problem.
        let problems = Ini::new(with_any(&text.replace("{P}", ""))).problems(version);
        let fatal = fatal(&problems);
        equal(&format!("{text:?} is refused because of {fatal:?}"), &!fatal.is_empty(), &wanted.is_none())?;
        match wanted {
            Some(wanted) => {
                equal(&format!("{text:?} is read as"), &read(&Ini::new(text.replace("{P}", ""))), &wanted)
            }
            None => equal("reading", &ini.as_bytes(), &text.as_bytes()),
        }
    });
}

/// The file, in which everybody is let in.
fn with_any(text: &str) -> Vec<u8> {
    let parameters = "auth_type = any\n{P}";
    text.replace("{P}", parameters).into_bytes()
}

#[test]
fn a_userlist_lets_in_whom_pgbouncer_lets_in() {
    on_each_version(USERLISTS, |installed, _, (text, good, bad)| {
        let all = good.iter().chain(*bad);
        let names: BTreeSet<_> = all.map(|(user, _)| *user).collect();
        let pgbouncer = installed.start_file(&plain(names), text.as_bytes())?;
        for (user, password) in *good {
            equal(
                &format!("{text:?} lets in {user:?} with {password:?}"),
                &pgbouncer.lets_in(user, password),
                &true,
            )?;
        }
        for (user, password) in *bad {
            equal(
                &format!("{text:?} lets in {user:?} with {password:?}"),
                &pgbouncer.lets_in(user, password),
                &false,
            )?;
        }
        let list = Userlist::new(*text);
        let broken = pgbouncer.log().contains("auth file");
        equal(&format!("{text:?} is broken"), &!fatal(&list.problems()).is_empty(), &broken)?;
        let found: BTreeSet<_> =
            list.users().into_iter().filter(|user| user.kind != "empty").map(|user| user.name).collect();
        let wanted: BTreeSet<_> = good.iter().map(|(user, _)| (*user).to_owned()).collect();
        let missing: Vec<_> = wanted.difference(&found).collect();
        let only_in: Vec<_> = found.difference(&wanted).filter(|user| *user != "a ").collect();
        equal(&format!("the users of {text:?}"), &(missing, only_in), &(vec![], vec![]))
    });
}

/// A file with plain passwords, whose users may look at the console.
fn plain<'a>(users: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    let users: Vec<_> = users.into_iter().collect();
    let users = users.join(", ");
    format!("[pgbouncer]\n{{P}}auth_type = plain\nauth_file = {{D}}/userlist.txt\nstats_users = {users}\n")
        .into_bytes()
}

/// A setting, what `check` says of it, and whether PgBouncer starts with it. `{T}` is a directory that everybody may write to, `{K}` are a
/// key and a certificate in it.
const NAMED: &[(&str, Option<&str>, bool)] = &[
    ("logfile = {T}/pgbouncer.log", None, true),
    ("logfile = {T}/nope/pgbouncer.log", Some("logfile: {T}/nope is no directory"), false),
    ("logfile = {T}", Some("logfile: {T} is a directory"), false),
    ("pidfile = {T}/nope/pid", Some("pidfile: {T}/nope is no directory"), false),
    ("pidfile = {T}", Some("pidfile: {T} is a directory"), false),
    ("unix_socket_dir = {T}/nope", Some("unix_socket_dir: {T}/nope is no directory"), false),
    ("auth_file = {T}/nope", Some("auth_file: {T}/nope cannot be read"), true),
    ("auth_type = hba\nauth_hba_file = {T}/nope", Some("auth_hba_file: {T}/nope is no file"), true),
    ("auth_hba_file = {T}/nope", None, true),
    ("auth_type = HBA\nauth_hba_file = {T}/nope", Some("auth_hba_file: {T}/nope is no file"), true),
    (
        "client_tls_sslmode = require",
        Some("client_tls_sslmode: require needs client_tls_key_file, which is not set"),
        false,
    ),
    ("client_tls_sslmode = require\n{K}", None, true),
    (
        "client_tls_sslmode = require\n{K}client_tls_ca_file = {T}/nope",
        Some("client_tls_ca_file: {T}/nope is no file"),
        false,
    ),
    ("client_tls_sslmode = verify-ca\n{K}client_tls_ca_file = {T}/cert", None, true),
    (
        "client_tls_sslmode = verify-ca\n{K}client_tls_ca_file = {T}/nope",
        Some("client_tls_ca_file: {T}/nope is no file"),
        false,
    ),
    (
        "client_tls_sslmode = verify-full\n{K}",
        Some("client_tls_sslmode: verify-full needs client_tls_ca_file, which is not set"),
        false,
    ),
    ("client_tls_sslmode = DISABLE\nclient_tls_key_file = {T}/nope", None, true),
    (
        "client_tls_sslmode = allow\nclient_tls_key_file = {T}/nope\nclient_tls_cert_file = {T}/nope",
        Some("client_tls_key_file: {T}/nope is no file"),
        false,
    ),
    ("client_tls_sslmode = disable\nclient_tls_key_file = {T}/nope", None, true),
    ("server_tls_sslmode = verify-full\nserver_tls_ca_file = {T}/nope", None, true),
];

#[test]
fn what_a_file_names_and_is_not_there_keeps_pgbouncer_from_starting_where_it_is_said() {
    on_each_version(NAMED, |installed, version, (setting, wanted, starts)| {
        let temporary = tempfile::tempdir().map_err(|error| error.to_string())?;
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o777))
            .map_err(|error| error.to_string())?;
        let there = temporary.path().display().to_string();
        let keys = "client_tls_key_file = {T}/key\nclient_tls_cert_file = {T}/cert\n";
        if setting.contains("{K}") {
            let mut openssl = Command::new("openssl");
            openssl.current_dir(temporary.path()).args(["req", "-x509", "-newkey", "ec", "-pkeyopt"]);
            openssl.args([
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-keyout",
                "key",
                "-out",
                "cert",
                "-subj",
                "/CN=x",
            ]);
            let made = openssl.output().map_err(|error| format!("openssl: {error}"))?;
            equal("openssl makes a key", &made.status.success(), &true)?;
            fs::set_permissions(temporary.path().join("key"), fs::Permissions::from_mode(0o644))
                .map_err(|error| error.to_string())?;
        }
        let ini = format!("[databases]\n[pgbouncer]\n{{P}}\n{setting}\n")
            .replace("{K}", keys)
            .replace("{T}", &there);
        let config = temporary.path().join("pgbouncer.ini");
        fs::write(&config, ini.replace("{P}", "")).map_err(|error| error.to_string())?;
        let findings = check(&config, None, version).map_err(|error| error.to_string())?;
        let said: Vec<_> = findings.iter().map(|finding| finding.problem.what.as_str()).collect();
        let wanted = wanted.map(|wanted| wanted.replace("{T}", &there));
        let is_wanted = match (&wanted, said.first()) {
            (Some(wanted), Some(said)) => said.starts_with(wanted.as_str()),
            (wanted, said) => wanted.is_none() && said.is_none(),
        };
        equal(&format!("{setting}: {said:?} begins with {wanted:?}"), &is_wanted, &true)?;
        let told = said.iter().any(|what| {
            what.contains("PgBouncer does not start") || what.contains("PgBouncer cannot listen")
        });
        let started = installed.start_file(ini.as_bytes(), b"");
        equal(setting, &(told, started.is_ok()), &(!starts, *starts))?;
        match &started {
            // Nobody can log in, as is said.
            Ok(pgbouncer) if wanted.is_some_and(|wanted| wanted.contains("hba")) => {
                equal(setting, &pgbouncer.lets_in("somebody", "x"), &false)
            }
            _ => Ok(()),
        }
    });
}

#[test]
fn what_is_edited_is_read_back_by_pgbouncer_as_it_was_meant() {
    let values = [
        "/run/it's here",
        "semi;colon",
        "#x",
        "=x",
        "a=b",
        " lead and trail ",
        "back\\slash",
        "\"q\"",
        "'",
        "''",
        "ü",
        "[x]",
        "a,b",
        "%include x",
    ];
    let names = ["a", "proj_abc123", "proj_abc", "_x", "0", "a.b-c", "A", LONGEST];
    // A file with traps for an editor: doubles, an entry beside its section, one without the last newline.
    let base = "[databases] a = host=old\nproj_abc1 = host=other\r\n; a = host=comment\na = host=old\n[pgbouncer]\n{P}auth_type = any\n[databases]\nz=host=last";
    let cases: Vec<_> =
        values.iter().flat_map(|value| names.iter().map(move |name| (*name, *value))).collect();
    let all = [cases.as_slice()];
    on_each_version(&all, |installed, version, cases| {
        for of_value in cases.chunks(names.len()) {
            let mut ini = Ini::new(base);
            let mut wanted = Databases::from([
                ("proj_abc1".into(), ("other".into(), "5432".into(), "proj_abc1".into())),
                ("z".into(), ("last".into(), "5432".into(), "z".into())),
            ]);
            for (place, (name, value)) in of_value.iter().enumerate() {
                let port = (6000 + place).to_string();
                let connection = Connection::default()
                    .set("host", value)?
                    .set("port", &port)?
                    .set("dbname", value)?
                    .set("password", value)?;
                let connection = connection.set("pool_size", "7")?.set("user", value)?;
                let parsed: DatabaseName = name.parse().map_err(|error| format!("{error}"))?;
                ini.set_database(&parsed, &connection)?;
                wanted.insert((*name).to_owned(), ((*value).to_owned(), port, (*value).to_owned()));
            }
            ini.set_parameter("default_pool_size", "3")?;
            ini.set_parameter("server_reset_query", "DISCARD ALL; -- it's #1")?;
            let text = String::from_utf8_lossy(ini.as_bytes()).into_owned();
            let problems = Ini::new(text.replace("{P}", "")).problems(version);
            equal(&text, &fatal(&problems), &vec![])?;
            let pgbouncer =
                installed.start_file(ini.as_bytes(), b"").map_err(|said| format!("{text}\n{said}"))?;
            let rows =
                pgbouncer.console("SHOW DATABASES").into_iter().filter(|row| row["name"] != "pgbouncer");
            let shown: Vec<_> = rows.collect();
            let databases = shown.iter().map(|row| {
                (row["name"].clone(), (row["host"].clone(), row["port"].clone(), row["database"].clone()))
            });
            equal(&text, &databases.collect(), &wanted)?;
            for row in shown.iter().filter(|row| names.contains(&row["name"].as_str())) {
                equal(
                    &text,
                    &(row["force_user"].as_str(), row["pool_size"].as_str()),
                    &(of_value[0].1, "7"),
                )?;
            }
            let config = pgbouncer.console("SHOW CONFIG");
            let value =
                |key: &str| config.iter().find(|row| row["key"] == key).map(|row| row["value"].clone());
            equal("default_pool_size", &value("default_pool_size"), &Some("3".into()))?;
            equal("server_reset_query", &value("server_reset_query"), &ini.parameter("server_reset_query"))?;
        }
        Ok(())
    });
}

#[test]
fn whom_an_edited_userlist_lets_in() {
    let users = [
        ("a", "x"),
        ("o'neil", "it's"),
        ("say \"hi\"", "\"q\"\"r\""),
        ("ü", "ß \\"),
        ("a b", " x "),
        ("z", "; # z"),
    ];
    on_each_version(&[users], |installed, _, users| {
        let mut list = Userlist::new("\"a\" \"old\" ; c\r\n\"a\" \"older\"\r\n\"b\" \"b\"");
        for (user, password) in users {
            let user: UserName = user.parse().map_err(|error| format!("{error}"))?;
            list.set(&user, &Secret::new(*password)?);
        }
        let names = users.iter().map(|(user, _)| *user).chain(["b"]);
        let pgbouncer = installed.start_file(&plain(names), list.as_bytes())?;
        for (user, password) in users.iter().chain([&("b", "b")]) {
            equal(user, &pgbouncer.lets_in(user, password), &true)?;
        }
        equal("the old password", &pgbouncer.lets_in("a", "old"), &false)
    });
}

#[test]
fn the_parameters_of_a_version_are_those_that_it_shows() {
    // Of all versions, with their values: what one knows and another does not is known or not here.
    let all: BTreeMap<String, String> = pgbouncers()
        .iter()
        .flat_map(|installed| {
            let pgbouncer = installed.start_file(&with_any("[pgbouncer]\n{P}"), b"").expect("it starts");
            pgbouncer.console("SHOW CONFIG").into_iter().map(|mut row| {
                let mut take = |column| row.remove(column).expect("all versions have it");
                (take("key"), take("value"))
            })
        })
        .collect();
    assert!(all.len() > 80, "{all:?}");
    on_each_version(&[()], |installed, version, ()| {
        let pgbouncer = installed.start_file(&with_any("[pgbouncer]\n{P}"), b"")?;
        let own: BTreeSet<_> =
            pgbouncer.console("SHOW CONFIG").into_iter().map(|mut row| row.remove("key")).collect();
        for (key, value) in &all {
            let problems = Ini::new(format!("[pgbouncer]\n{key} = {value}\n")).problems(version);
            equal(key, &fatal(&problems).is_empty(), &own.contains(&Some(key.clone())))?;
        }
        // A second section sets back what the first has set, but for what has no default.
        let twice = "[pgbouncer]\ndefault_pool_size = 7\nauth_user = u\nstats_users = s\n[databases]\n[pgbouncer]\n{P}";
        let pgbouncer = installed.start_file(&with_any(twice), b"")?;
        let config = pgbouncer.console("SHOW CONFIG");
        for (key, default) in [("default_pool_size", "20"), ("auth_user", ""), ("stats_users", "")] {
            let shown = config.iter().find(|row| row["key"] == key).map(|row| row["value"].clone());
            let read = Ini::new(twice).parameter(key).unwrap_or(default.to_owned());
            equal(key, &Some(read), &shown)?;
        }
        Ok(())
    });
}
