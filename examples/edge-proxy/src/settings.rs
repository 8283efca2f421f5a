//! The configuration: flag, then environment, then `.env`, then the TOML file, then the default.
//!
//! Every value remembers where it came from, so that a mistake is named where it was made. The process environment
//! is only read: `.env` goes into a map of its own.
//!
//! Variables `EDGE_PROXY_*` that are no flag are passed over in silence: Kubernetes sets `EDGE_PROXY_PORT` and its
//! like for a Service of that name. Unknown keys in the TOML file are mistakes, because nobody else writes there.

mod companions;
mod neighbours;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use axum_service::resources::{CacheUrl, Connections, DatabaseUrl, Pooler, Registry, RegistryUrl};
use axum_service::{dotenv, host, secrets};
use shutdown_core::breaker;
use shutdown_core::{LameDuckPolicy, ShutdownConfig, display_duration, parse_duration};
use shutdown_pgbouncer::DatabaseName;

use crate::flags::Flags;
pub(crate) use crate::settings::companions::CompanionSettings;
pub(crate) use crate::settings::neighbours::{Neighbours, Notices};
use crate::targets::WhenAllOpen;
use crate::upstreams::Upstream;

/// The flags that take a value.
pub(crate) const FLAGS: [&str; 26] = [
    "config",
    "listen",
    "admin",
    "upstream",
    "breaker",
    "when-all-open",
    "data-dir",
    "state-interval",
    "database",
    "database-connections",
    "pgbouncer-config",
    "pgbouncer-database",
    "cache",
    "cache-interval",
    "registry",
    "peer",
    "notice-listen",
    "notice-key-file",
    "mdns",
    "service-type",
    "node-id",
    "cluster",
    "lame-duck-policy",
    "companion",
    "pid-file",
    "admin-token-file",
];

/// The flags that take none: true or false where they are not a flag.
pub(crate) const SWITCHES: [&str; 2] = ["notice-insecure", "reap"];

/// The flags that can be repeated, and what separates them in a variable; in the file they are an array.
const REPEATED: [(&str, char); 4] = [("upstream", ','), ("peer", ','), ("mdns", ','), ("companion", ';')];

/// The request log's file in the data directory.
const DATABASE: &str = "edge-proxy.db";
/// How long a write to the cache waits for others.
const CACHE_INTERVAL: Duration = Duration::from_millis(100);

/// Everything that can be set, checked.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Empty: the built-in demo.
    pub(crate) upstreams: Vec<Upstream>,
    /// `None`: off.
    pub(crate) breaker: Option<breaker::Config>,
    pub(crate) when_all_open: WhenAllOpen,
    pub(crate) data_dir: PathBuf,
    /// Zero: not by the clock.
    pub(crate) state_interval: Duration,
    /// `None`: off.
    pub(crate) database: Option<DatabaseUrl>,
    pub(crate) connections: Connections,
    /// `None`: the database itself.
    pub(crate) pooler: Option<Pooler>,
    /// `None`: off.
    pub(crate) cache: Option<CacheUrl>,
    pub(crate) cache_interval: Duration,
    pub(crate) registry: Option<RegistryUrl>,
    pub(crate) neighbours: Neighbours,
    pub(crate) companions: CompanionSettings,
    /// This process's own; `None`: none.
    pub(crate) pid_file: Option<PathBuf>,
    /// As given; see [`node_id`](Self::node_id).
    node_id: Option<String>,
    pub(crate) cluster: String,
    pub(crate) admin_token: Option<String>,
    pub(crate) reap: bool,
    pub(crate) budgets: ShutdownConfig,
}

/// The process environment, or a test's.
pub(crate) type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Settings {
    /// Reads all sources and checks every value. Writes nothing.
    ///
    /// # Errors
    ///
    /// The first mistake, as one sentence that names where it was made.
    pub(crate) fn load(flags: &Flags, environment: Environment<'_>, env_file: &Path) -> Result<Self, String> {
        let mut sources = Sources {
            flags,
            environment,
            dotenv: dotenv::read(env_file)?,
            file: BTreeMap::new(),
            path: None,
        };
        if let Some(config) = sources.one("config")? {
            sources.file = read_file(&config)?;
            sources.path = Some(config.text);
        }
        let listen = sources.addr("listen", "127.0.0.1:8080")?;
        let admin = sources.addr("admin", "127.0.0.1:8081")?;
        let admin_token =
            sources.one("admin-token-file")?.map(|path| secrets::token(&path.text, &path)).transpose()?;
        if listen == admin && listen.port() != 0 {
            return Err(format!("--listen and --admin are both {listen}: give them different ports"));
        }
        let data_dir =
            PathBuf::from(sources.name("data-dir")?.unwrap_or_else(|| "./edge-proxy-data".to_owned()));
        let database = sources.url_or_off("database", || DatabaseUrl::file(&data_dir.join(DATABASE)))?;
        let pooler = sources.pooler(database.as_ref())?;
        let most = if pooler.is_some() { Pooler::CONNECTIONS } else { Connections::default() };
        let settings = Self {
            listen,
            admin,
            upstreams: sources.upstreams()?,
            breaker: sources.breaker()?,
            when_all_open: sources.when_all_open()?,
            database,
            connections: sources.url("database-connections")?.unwrap_or(most),
            pooler,
            cache: sources.url_or_off("cache", || CacheUrl::Memory)?,
            cache_interval: sources.duration("cache-interval", CACHE_INTERVAL)?,
            registry: sources.url("registry")?,
            neighbours: sources.neighbours()?,
            companions: sources.companions()?,
            pid_file: sources.name("pid-file")?.map(PathBuf::from),
            data_dir,
            state_interval: sources.duration("state-interval", shutdown_core::state::INTERVAL)?,
            node_id: sources.name("node-id")?,
            cluster: sources.name("cluster")?.unwrap_or_else(|| "default".to_owned()),
            admin_token,
            reap: sources.switch("reap")?,
            budgets: sources.budgets()?,
        };
        settings.check_admin(admin)?;
        settings.neighbours.check(listen)?;
        if let Some(url) = settings.registry.clone() {
            Registry::new(url, &settings.node_id(listen.port()))
                .map_err(|error| format!("--node-id: {error}"))?;
        }
        Ok(settings)
    }

    /// Whether the admin routes may answer there.
    ///
    /// # Errors
    ///
    /// They need a token; one sentence.
    pub(crate) fn check_admin(&self, admin: SocketAddr) -> Result<(), String> {
        if self.admin_token.is_some() || admin.ip().is_loopback() {
            return Ok(());
        }
        Err(format!(
            "the admin address {admin} is not loopback, so anybody who reaches it could stop the proxy: give \
             --admin-token-file, or listen on 127.0.0.1"
        ))
    }

    /// The node's name, once the port is known.
    pub(crate) fn node_id(&self, port: u16) -> String {
        self.node_id.clone().unwrap_or_else(|| format!("{}-{port}", host::name()))
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<22} {value}");
        line("listen", &self.listen)?;
        line("admin", &self.admin)?;
        match self.upstreams.as_slice() {
            [] => line("upstream", &"built-in demo")?,
            given => given.iter().try_for_each(|upstream| line("upstream", upstream))?,
        }
        match &self.breaker {
            None => line("breaker", &"off")?,
            Some(config) => line("breaker", config)?,
        }
        line("when-all-open", &self.when_all_open)?;
        line("data-dir", &self.data_dir.display())?;
        line("state-interval", &display_duration(self.state_interval))?;
        line("database", shown(&self.database))?;
        line("database-connections", &self.connections)?;
        match &self.pooler {
            None => line("pgbouncer-config", &"none")?,
            Some(pooler) => {
                line("pgbouncer-config", pooler)?;
                line("pgbouncer-database", &pooler.database(&self.node_id(self.listen.port())))?;
            }
        }
        line("cache", shown(&self.cache))?;
        line("cache-interval", &display_duration(self.cache_interval))?;
        line("registry", shown(&self.registry))?;
        self.neighbours.lines(&mut line)?;
        line("node-id", &self.node_id(self.listen.port()))?;
        line("cluster", &self.cluster)?;
        line("lame-duck-policy", &self.budgets.lame_duck_policy)?;
        self.companions.lines(&mut line)?;
        match &self.pid_file {
            Some(path) => line("pid-file", &path.display())?,
            None => line("pid-file", &"none")?,
        }
        line("admin token", &if self.admin_token.is_some() { "required" } else { "none" })?;
        line("reap", &self.reap)?;
        let grace = self.budgets.grace_period;
        line(
            "SHUTDOWN_GRACE_PERIOD",
            &grace.map_or("unknown".to_owned(), |grace| display_duration(grace).to_string()),
        )
    }
}

/// What is off is shown as that.
pub(crate) fn shown<T: fmt::Display>(value: &Option<T>) -> &dyn fmt::Display {
    value.as_ref().map_or(&"off", |value| value as &dyn fmt::Display)
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As it is shown, and so never the token.
        f.debug_tuple("Settings").field(&self.to_string()).finish()
    }
}

/// Where values come from, the first before the next.
struct Sources<'a> {
    flags: &'a Flags,
    environment: Environment<'a>,
    dotenv: BTreeMap<String, String>,
    file: BTreeMap<String, Vec<String>>,
    path: Option<String>,
}

/// A value and where it was written.
#[derive(Clone, Debug)]
struct Value {
    text: String,
    from: String,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.from, self.text)
    }
}

impl Sources<'_> {
    /// What the first source that has it says about a flag.
    fn all(&self, flag: &str) -> Result<Vec<Value>, String> {
        let value = |from: &str, text: String| Value { text, from: from.to_owned() };
        let given = self.flags.given(flag);
        if !given.is_empty() {
            return Ok(given.into_iter().map(|text| value(&format!("--{flag}"), text)).collect());
        }
        let variable = format!("EDGE_PROXY_{}", flag.to_uppercase().replace('-', "_"));
        if let Some((from, text)) = self.variable(&variable)? {
            let parts: Vec<_> = match REPEATED.iter().find(|(name, _)| *name == flag) {
                Some((_, separator)) => {
                    companions::parts(&text, *separator).into_iter().map(ToOwned::to_owned).collect()
                }
                None => vec![text],
            };
            return Ok(parts.into_iter().map(|text| value(&from, text)).collect());
        }
        let key = flag.replace('-', "_");
        let from = format!("{}: {key}", self.path.as_deref().unwrap_or_default());
        Ok(self.file.get(&key).into_iter().flatten().map(|text| value(&from, text.clone())).collect())
    }

    fn one(&self, flag: &str) -> Result<Option<Value>, String> {
        let mut all = self.all(flag)?;
        match all.len() {
            0 | 1 => Ok(all.pop()),
            _ => Err(format!("{} takes one value, not {}", all[0].from, all.len())),
        }
    }

    /// A name that is not empty.
    fn name(&self, flag: &str) -> Result<Option<String>, String> {
        match self.one(flag)? {
            Some(value) if value.text.trim().is_empty() => Err(format!("{} is empty", value.from)),
            value => Ok(value.map(|value| value.text)),
        }
    }

    fn addr(&self, flag: &str, default: &str) -> Result<SocketAddr, String> {
        let value = self.one(flag)?;
        let text = value.as_ref().map_or(default, |value| &value.text);
        text.parse().map_err(|_| {
            let from = value.as_ref().map_or_else(|| text.to_owned(), ToString::to_string);
            format!("{from} is not an address: write an IP address and a port, as {default}")
        })
    }

    fn switch(&self, flag: &str) -> Result<bool, String> {
        let Some(value) = self.one(flag)? else { return Ok(false) };
        value.text.trim().parse().map_err(|_| format!("{value} is neither true nor false"))
    }

    fn duration(&self, flag: &str, default: Duration) -> Result<Duration, String> {
        let Some(value) = self.one(flag)? else { return Ok(default) };
        parse_duration(&value.text).map_err(|problem| format!("{value}: {problem}"))
    }

    /// A URL. What is wrong with it is the parser's to say: the text may hold a password.
    fn url<T: FromStr<Err = String>>(&self, flag: &str) -> Result<Option<T>, String> {
        let Some(value) = self.one(flag)? else { return Ok(None) };
        value.text.trim().parse().map(Some).map_err(|error| format!("{}: {error}", value.from))
    }

    /// A URL with a default; `None` for `off`.
    fn url_or_off<T: FromStr<Err = String>>(
        &self,
        flag: &str,
        default: impl FnOnce() -> T,
    ) -> Result<Option<T>, String> {
        match self.one(flag)? {
            Some(value) if value.text.trim() == "off" => Ok(None),
            _ => Ok(Some(self.url(flag)?.unwrap_or_else(default))),
        }
    }

    fn pooler(&self, database: Option<&DatabaseUrl>) -> Result<Option<Pooler>, String> {
        let name = self.one("pgbouncer-database")?;
        let Some(config) = self.one("pgbouncer-config")? else {
            return match name {
                Some(name) => {
                    Err(format!("{name} is a database in a PgBouncer: give --pgbouncer-config, too"))
                }
                None => Ok(None),
            };
        };
        if config.text.trim().is_empty() {
            return Err(format!("{} is empty", config.from));
        }
        let name = name.map(|name| match name.text.parse::<DatabaseName>() {
            Ok(parsed) => Ok(parsed),
            Err(error) => Err(format!("{}: {error}", name.from)),
        });
        let pooler = Pooler::new(&config.text, name.transpose()?, database);
        pooler.map(Some).map_err(|problem| format!("{}: {problem}", config.from))
    }

    fn upstreams(&self) -> Result<Vec<Upstream>, String> {
        let all = self.all("upstream")?;
        all.iter()
            .map(|value| Upstream::parse(&value.text).map_err(|error| format!("{error} ({})", value.from)))
            .collect()
    }

    fn breaker(&self) -> Result<Option<breaker::Config>, String> {
        match self.one("breaker")? {
            None => Ok(Some(breaker::Config::default())),
            Some(value) if value.text.trim() == "off" => Ok(None),
            Some(value) => value.text.parse().map(Some).map_err(|error| format!("{value}: {error}")),
        }
    }

    fn when_all_open(&self) -> Result<WhenAllOpen, String> {
        let Some(policy) = self.one("when-all-open")? else { return Ok(WhenAllOpen::default()) };
        WhenAllOpen::parse(&policy.text).ok_or_else(|| format!("{policy} is no policy: write refuse or try"))
    }

    fn budgets(&self) -> Result<ShutdownConfig, String> {
        // Fetched first, because `from_lookup` has no way to pass on what is wrong with a source.
        let mut given = BTreeMap::new();
        for &name in ShutdownConfig::VARIABLES {
            let from_file = || self.file.get(&name.to_lowercase()).and_then(|values| values.first().cloned());
            if let Some(text) = self.variable(name)?.map(|(_, text)| text).or_else(from_file) {
                given.insert(name, text);
            }
        }
        let mut budgets = ShutdownConfig::from_lookup(|name| given.get(name).cloned())
            .map_err(|error| error.to_string())?;
        // The policy has two names. Flag and environment go before the file under either; else the flag's name.
        let given = |name| self.variable(name).map(|given| given.is_some());
        let from_file =
            self.flags.given("lame-duck-policy").is_empty() && !given("EDGE_PROXY_LAME_DUCK_POLICY")?;
        if let Some(policy) = self.one("lame-duck-policy")?
            && !(from_file && given("SHUTDOWN_LAME_DUCK_POLICY")?)
        {
            budgets.lame_duck_policy = LameDuckPolicy::parse(&policy.text).ok_or_else(|| {
                format!("{} {:?} is no policy: write all, read-only or gradual", policy.from, policy.text)
            })?;
        }
        Ok(budgets)
    }

    /// A variable of the environment, else of `.env`, and how to call it.
    fn variable(&self, name: &str) -> Result<Option<(String, String)>, String> {
        match (self.environment)(name) {
            Some(raw) => match raw.into_string() {
                Ok(text) => Ok(Some((name.to_owned(), text))),
                // Not what it is: there may be a password in it.
                Err(_) => Err(format!("{name} is not Unicode")),
            },
            None => Ok(self.dotenv.get(name).map(|text| (format!(".env: {name}"), text.clone()))),
        }
    }
}

fn read_file(path: &Value) -> Result<BTreeMap<String, Vec<String>>, String> {
    let text = std::fs::read_to_string(&path.text)
        .map_err(|error| format!("the configuration file {path} cannot be read: {error}"))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
        format!("{}, line {line}: {}", path.text, error.message().replace('\n', "; "))
    })?;
    let mut values = BTreeMap::new();
    for (key, value) in table {
        let name = key.replace('-', "_");
        let is_flag = FLAGS.iter().any(|flag| *flag != "config" && flag.replace('-', "_") == name);
        let is_switch = SWITCHES.iter().any(|switch| switch.replace('-', "_") == name);
        let is_budget = ShutdownConfig::VARIABLES.iter().any(|variable| variable.to_lowercase() == name);
        if !is_flag && !is_switch && !is_budget {
            return Err(format!("{}: unknown key {key:?}; see --help for the names", path.text));
        }
        let texts = match value {
            toml::Value::String(text) => vec![text],
            toml::Value::Boolean(on) if is_switch => vec![on.to_string()],
            toml::Value::Integer(seconds) if is_budget => vec![seconds.to_string()],
            toml::Value::Array(parts) if REPEATED.iter().any(|(repeated, _)| *repeated == name) => parts
                .into_iter()
                .map(|part| match part {
                    toml::Value::String(text) => Ok(text),
                    other => Err(format!(
                        "{}: {key} has a part that is no string but {}",
                        path.text,
                        other.type_str()
                    )),
                })
                .collect::<Result<_, _>>()?,
            other => {
                let form = match () {
                    () if is_budget => "a string like \"1500ms\" or whole seconds",
                    () if is_switch => "true or false",
                    () => "a string",
                };
                return Err(format!("{}: {key} must be {form}, not {}", path.text, other.type_str()));
            }
        };
        if values.insert(name, texts).is_some() {
            return Err(format!("{}: {key} is given twice", path.text));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Loads with these flags, this environment, this `.env` and this TOML file.
    fn load(
        flags: Flags,
        environment: &[(&str, &str)],
        dotenv: &str,
        file: &str,
    ) -> Result<Settings, String> {
        let dir = tempfile::tempdir().unwrap();
        let (dotenv_path, file_path) = (dir.path().join(".env"), dir.path().join("edge.toml"));
        std::fs::write(&dotenv_path, dotenv).unwrap();
        std::fs::write(&file_path, file).unwrap();
        let config = Some(file_path.to_str().unwrap().to_owned());
        let lookup = |name: &str| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        };
        Settings::load(&Flags { config, ..flags }, &lookup, &dotenv_path)
    }

    fn listen(addr: &str) -> Flags {
        Flags { listen: Some(addr.to_owned()), ..Flags::default() }
    }

    #[test]
    fn a_flag_goes_before_the_environment_before_dotenv_before_the_file_before_the_default() {
        let dotenv = "EDGE_PROXY_LISTEN=127.0.0.1:3\n";
        let file = "listen = '127.0.0.1:4'";
        let env = [("EDGE_PROXY_LISTEN", "127.0.0.1:2")];
        let port = |settings: Result<Settings, String>| settings.unwrap().listen.port();
        assert_eq!(port(load(listen("127.0.0.1:1"), &env, dotenv, file)), 1);
        assert_eq!(port(load(Flags::default(), &env, dotenv, file)), 2);
        assert_eq!(port(load(Flags::default(), &[], dotenv, file)), 3);
        assert_eq!(port(load(Flags::default(), &[], "", file)), 4);
        assert_eq!(port(load(Flags::default(), &[], "", "")), 8080);
    }

    #[test]
    fn the_policy_follows_the_same_order_under_both_its_names() {
        let file = "lame-duck-policy = 'gradual'";
        let environment = &[("SHUTDOWN_LAME_DUCK_POLICY", "read-only")];
        let policy = |flags, environment: &[(&str, &str)]| {
            load(flags, environment, "", file).map(|settings| settings.budgets.lame_duck_policy)
        };
        assert_eq!(policy(Flags::default(), &[]), Ok(LameDuckPolicy::Gradual));
        assert_eq!(policy(Flags::default(), environment), Ok(LameDuckPolicy::ReadOnly));
        let all = || Flags { lame_duck_policy: Some("all".into()), ..Flags::default() };
        assert_eq!(policy(all(), environment), Ok(LameDuckPolicy::All));
        let wrong = Flags { lame_duck_policy: Some("readonly".into()), ..Flags::default() };
        let error = policy(wrong, &[]).unwrap_err();
        assert!(error.contains("--lame-duck-policy") && error.contains("\"readonly\""), "{error}");
    }

    #[test]
    fn a_switch_follows_the_same_order() {
        let reap =
            |flags, environment: &[(&str, &str)], file| load(flags, environment, "", file).unwrap().reap;
        let on = || Flags { reap: true, ..Flags::default() };
        assert!(reap(on(), &[("EDGE_PROXY_REAP", "false")], "reap = false"));
        assert!(reap(Flags::default(), &[("EDGE_PROXY_REAP", "true")], "reap = false"));
        assert!(!reap(Flags::default(), &[("EDGE_PROXY_REAP", "false")], "reap = true"));
        assert!(reap(Flags::default(), &[], "reap = true"));
        assert!(!reap(Flags::default(), &[], ""));
    }

    #[test]
    fn budgets_come_from_the_same_sources() {
        let file = "shutdown_total_timeout = '9s'\nshutdown_lame_duck = 3\nshutdown_linger = '100ms'";
        let settings =
            load(Flags::default(), &[("SHUTDOWN_TOTAL_TIMEOUT", "7")], "SHUTDOWN_LAME_DUCK=2\n", file)
                .unwrap();
        assert_eq!(settings.budgets.total, Duration::from_secs(7));
        assert_eq!(settings.budgets.lame_duck, Duration::from_secs(2));
        assert_eq!(settings.budgets.linger, Duration::from_millis(100));
    }

    #[test]
    fn several_upstreams_are_a_repeated_flag_a_comma_or_an_array() {
        let (a, b) = ("http://127.0.0.1:1", "http://b:2");
        let flags = Flags { upstream: vec![a.into(), b.into()], ..Flags::default() };
        let both = format!("{a}, {b}");
        for settings in [
            load(flags, &[], "", ""),
            load(Flags::default(), &[("EDGE_PROXY_UPSTREAM", &both)], "", ""),
            load(Flags::default(), &[], "", &format!("upstream = ['{a}', '{b}']")),
        ] {
            assert_eq!(settings.unwrap().upstreams.len(), 2);
        }
    }

    #[test]
    fn every_mistake_is_one_sentence_that_names_its_place() {
        let none = Flags::default;
        let cases = [
            (load(listen("8080"), &[], "", ""), "--listen \"8080\""),
            (load(none(), &[("EDGE_PROXY_ADMIN", "x")], "", ""), "EDGE_PROXY_ADMIN \"x\""),
            (load(none(), &[], "EDGE_PROXY_ADMIN=x\n", ""), ".env: EDGE_PROXY_ADMIN \"x\""),
            (load(none(), &[], "", "admin = 'x'"), "edge.toml: admin \"x\""),
            (load(none(), &[], "", "lisen = 'lo'"), "unknown key \"lisen\""),
            (load(none(), &[], "", "config = 'other'"), "unknown key \"config\""),
            (load(none(), &[], "", "listen = 1"), "listen must be a string"),
            (load(none(), &[], "", "reap = 1"), "reap must be true or false"),
            (load(none(), &[], "", "reap = 'yes'"), "edge.toml: reap \"yes\" is neither"),
            (load(none(), &[("EDGE_PROXY_REAP", "1")], "", ""), "EDGE_PROXY_REAP \"1\" is neither"),
            (load(none(), &[], "", "\n\nlisten = "), "line 3"),
            (load(none(), &[], "A=1\nnot a pair\n", ""), ".env, line 2"),
            (load(none(), &[], "", "shutdown_linger = 'soon'"), "SHUTDOWN_LINGER=\"soon\""),
            (load(none(), &[], "", "shutdown_linger = 1.5"), "shutdown_linger must be"),
            (load(none(), &[], "", "admin = '0.0.0.0:1'"), "give --admin-token-file"),
            (load(none(), &[], "", "admin = '127.0.0.1:8080'"), "different ports"),
            (
                load(none(), &[], "", "admin_token_file = '/none'"),
                "admin_token_file \"/none\" cannot be read",
            ),
            (load(none(), &[], "", "upstream = 'a:1'"), "has no scheme: write http://a:1"),
            (load(none(), &[], "", "cluster = ' '"), "cluster is empty"),
            (
                load(none(), &[], "", "breaker = 'percent=0'"),
                "edge.toml: breaker \"percent=0\": percent=0 is",
            ),
            (
                load(none(), &[("EDGE_PROXY_BREAKER", "on")], "", ""),
                "EDGE_PROXY_BREAKER \"on\": \"on\" is no part",
            ),
            (load(none(), &[], "", "when-all-open = 'open'"), "when_all_open \"open\" is no policy"),
            (
                load(none(), &[], "", "database = 'mysql://me:secret@db/x'"),
                "edge.toml: database: no database",
            ),
            (
                load(none(), &[("EDGE_PROXY_DATABASE", "postgres://me:secret@db:x/y")], "", ""),
                "EDGE_PROXY_DATABASE: the database URL",
            ),
            (
                load(none(), &[], "EDGE_PROXY_CACHE=memcached://me:secret@a\n", ""),
                ".env: EDGE_PROXY_CACHE: no cache",
            ),
            (load(none(), &[], "", "cache = 'redis://me:secret@a:b'"), "cache: the cache URL"),
            (
                load(none(), &[], "", "database_connections = '1'"),
                "edge.toml: database_connections: write how many",
            ),
            (load(none(), &[], "", "pgbouncer_config = '/a'"), "pgbouncer_config: PgBouncer pools"),
            (load(none(), &[], "", "pgbouncer_config = '/a'\ndatabase = 'off'"), "there is none: give"),
            (load(none(), &[], "", "pgbouncer_database = 'a'"), "give --pgbouncer-config, too"),
            (
                load(none(), &[], "", "pgbouncer_config = '/a'\npgbouncer_database = 'a b'"),
                "pgbouncer_database: \"a b\" is no name",
            ),
            (load(none(), &[], "", "cache_interval = 'soon'"), "cache_interval \"soon\""),
            (load(none(), &[], "", "registry = 'http://me:secret@a/'"), "registry: the registry URL"),
            (
                load(none(), &[], "", "registry = 'http://a/'\nnode-id = 'a/b'"),
                "--node-id: \"a/b\" cannot be",
            ),
        ];
        for (settings, expected) in cases {
            let error = settings.map(|settings| settings.to_string()).unwrap_err();
            assert!(error.contains(expected), "{expected} is not in: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn database_and_cache_have_defaults_can_be_off_and_are_shown_without_passwords() {
        let line = |file: &str, name: &str| {
            let shown = load(Flags::default(), &[], "", file).unwrap().to_string();
            let line = shown.lines().find(|line| line.split_whitespace().next() == Some(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(line("data-dir = '/var/edge'", "database"), "sqlite:/var/edge/edge-proxy.db");
        assert_eq!((line("", "cache"), line("", "registry")), ("memory:".into(), "off".into()));
        for name in ["database", "cache"] {
            assert_eq!(line(&format!("{name} = 'off'"), name), "off");
        }
        assert_eq!(line("database = 'postgres://me:secret@db/x'", "database"), "postgres://db:5432/x");
        assert_eq!(line("cache = 'redis://me:secret@a:1'", "cache"), "redis://a:1");
    }

    #[test]
    fn a_pgbouncer_makes_the_connections_few_and_the_nodes_name_a_database() {
        let shown = |file: &str| load(Flags::default(), &[], "", file).unwrap().to_string();
        let words = |shown: &str, name: &str| {
            let line = shown.lines().find(|line| line.split_whitespace().next() == Some(name));
            line.map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
        };
        let plain = shown("");
        assert_eq!(words(&plain, "database-connections").as_deref(), Some("16"));
        assert_eq!(words(&plain, "pgbouncer-config").as_deref(), Some("none"));
        assert_eq!(words(&plain, "pgbouncer-database"), None);
        let pooled = "database = 'postgres://db/x'\npgbouncer_config = '/p.ini'\nnode_id = 'a:1'\n";
        assert_eq!(words(&shown(pooled), "database-connections").as_deref(), Some("4"));
        assert_eq!(words(&shown(pooled), "pgbouncer-config").as_deref(), Some("/p.ini"));
        assert_eq!(words(&shown(pooled), "pgbouncer-database").as_deref(), Some("a_1"));
        let named = shown(&format!("{pooled}pgbouncer_database = 'mine'\ndatabase_connections = '7'"));
        assert_eq!(words(&named, "pgbouncer-database").as_deref(), Some("mine"));
        assert_eq!(words(&named, "database-connections").as_deref(), Some("7"));
    }

    #[test]
    fn a_breaker_is_off_or_what_is_given_and_the_defaults_for_the_rest() {
        let breaker = |text: &str| {
            let flags = Flags { breaker: Some(text.to_owned()), ..Flags::default() };
            let shown = load(flags, &[], "", "").unwrap().to_string();
            let line = shown.lines().find(|line| line.starts_with("breaker ")).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(breaker("off"), "off");
        assert_eq!(breaker(""), "percent=50,volume=20,sleep=5s,probes=3,window=10s");
        assert_eq!(breaker("volume=5, sleep=500ms"), "percent=50,volume=5,sleep=500ms,probes=3,window=10s");
    }

    #[test]
    fn a_line_of_dotenv_that_is_wrong_is_named_and_not_repeated() {
        let error = load(Flags::default(), &[], "A=1\nPASSWORD=very secret\n", "").unwrap_err();
        assert!(error.contains(".env, line 2") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn what_kubernetes_sets_for_a_service_of_this_name_is_no_mistake() {
        load(Flags::default(), &[("EDGE_PROXY_PORT", "tcp://10.0.0.1:80")], "", "").unwrap();
    }

    #[test]
    fn the_token_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret\n").unwrap();
        let flags = Flags { admin_token_file: path.to_str().map(ToOwned::to_owned), ..Flags::default() };
        let settings = load(flags, &[], "", "admin = '0.0.0.0:1'").unwrap();
        assert_eq!(settings.admin_token.as_deref(), Some("s3cret"));
        assert!(!format!("{settings} {settings:?}").contains("s3cret"));
    }
}
