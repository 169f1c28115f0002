//! The roles that run in the foreground: center, AP, relay.
//!
//! A role holds a lock on `<run>/daemon.pid`, so that a site has one daemon, and tells a service
//! manager that it serves (`Type=notify`). SIGTERM and SIGINT end it in good order; its machines
//! run on.

use std::io::{IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use godwit_cloud::api::{Api, Routes};
use godwit_cloud::daemon::{
    Agent, AgentConfig, Center, CenterConfig, ClientFiles, FrontConfig, TlsFiles, join_site,
};
use godwit_migrate::relay::{RelayConfig, run_relay};
use godwit_site::{SiteDirs, Uids};
use godwit_transfer::JoinToken;
use godwit_types::Fault;
use godwit_types::{Code, Name};
use rustix::fs::{FlockOperation, flock};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Places, bytes, client_files};
use crate::failure::{Failure, Outcome, Result};

/// Name of the file with a daemon's process id, in its run directory.
pub(super) const PID_FILE: &str = "daemon.pid";

/// How a role logs and lives, and how patient it is.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Living {
    /// Log lines as JSON
    #[arg(long)]
    log_json: bool,
    /// Seconds of silence after which a link to another site is taken for lost [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(5..=3600))]
    link_patience: Option<u64>,
    /// Leave the vCPUs of this host's machines to the kernel; else siblings are kept apart and close
    /// where that may be done, as `godwit sched run` does
    #[arg(long)]
    no_co_scheduling: bool,
    /// Seconds between two checks of all that is stored [default: a day]
    #[arg(long, value_name = "SECONDS", hide = true, value_parser = clap::value_parser!(u64).range(1..))]
    scrub_every: Option<u64>,
    /// Uids, FIRST-LAST, of which each QEMU and relay gets one of its own; `off` leaves them to this user. By
    /// default 2000000000-2000065535 for root, off for others
    #[arg(long, value_name = "UIDS", default_value = "usual", hide_default_value = true)]
    uid_range: Uids,
    /// Ports of this host that machines may publish, FIRST-LAST [default: 1024-65535]
    #[arg(long, value_name = "PORTS", value_parser = port_range)]
    publish_ports: Option<std::ops::RangeInclusive<u16>>,
    /// Leave the caller's session
    #[arg(long, hide = true)]
    own_session: bool,
}

/// `FIRST-LAST`, or one port.
fn port_range(text: &str) -> Result<std::ops::RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(first..=last),
        _ => Err("give the first and the last port, such as 20000-29999".into()),
    }
}

/// `godwit center`.
#[derive(Debug, Args)]
pub(crate) struct CenterRole {
    /// Name of the center's own site
    #[arg(long, default_value = "center")]
    name: Name,
    #[command(flatten)]
    places: Places,
    /// Where the API listens; port 0 picks one
    #[arg(long, default_value = "127.0.0.1:7700", value_name = "ADDR:PORT")]
    api: SocketAddr,
    /// Where other sites connect (UDP); port 0 picks one
    #[arg(long, default_value = "127.0.0.1:7701", value_name = "ADDR:PORT")]
    link: SocketAddr,
    /// Under which address other sites reach it, when that is not `--link`
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where token, certificate and address for clients are written [default: ~/.config/godwit]
    /// [env: GODWIT_CONFIG]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// Also write the operator token here
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Also write the API's certificate here
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Bytes that the pool may hold on disk, e.g. 20G [default: 64G]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pool_limit: Option<u64>,
    /// The API's certificate, with those that signed it (PEM); read again when it changes, or at
    /// SIGHUP [default: one of its own making]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of `--tls-cert` (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Seconds for which it certifies sites [default: 90 days]
    #[arg(long, value_name = "SECONDS", hide = true, value_parser = clap::value_parser!(u64).range(3..))]
    certificate_life: Option<u64>,
    /// Memory for substrates that no machine runs from, e.g. 1G; they are made again from the pool
    /// when it is full [default: half of the tmpfs]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_cache: Option<u64>,
    /// Memory that may be kept of machines that have left, for when they come back, e.g. 1G; it makes
    /// room for whatever needs some [default: a quarter of the above]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_visits: Option<u64>,
    /// Memory that its machines may be promised, e.g. 48G; each is promised all of its own and what
    /// its QEMU takes, however little it has written to [default: what the host has]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_promise: Option<u64>,
    #[command(flatten)]
    living: Living,
}

/// `godwit ap`.
#[derive(Debug, Args)]
pub(crate) struct ApRole {
    /// Name of the site, as in its join token
    #[arg(long)]
    name: Option<Name>,
    #[command(flatten)]
    places: Places,
    /// At the first start: where the join token is, `@FILE` or `-` for stdin
    #[arg(long, env = "GODWIT_JOIN_TOKEN", hide_env_values = true, value_name = "@FILE")]
    join: Option<String>,
    /// Where it listens for other sites (UDP); port 0 picks one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR:PORT")]
    link: SocketAddr,
    /// Where the center's API is served for people here, each with a token of its own; their
    /// requests go over this site's link to its center [default: nowhere]
    #[arg(long, value_name = "ADDR:PORT")]
    api: Option<SocketAddr>,
    /// The certificate of `--api`, with those that signed it (PEM); read again when it changes, or
    /// at SIGHUP [default: one of its own making]
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "api"])]
    tls_cert: Option<PathBuf>,
    /// The key of `--tls-cert` (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Also write the certificate of `--api` here, for `godwit --ca`
    #[arg(long, value_name = "FILE", requires = "api")]
    ca_file: Option<PathBuf>,
    /// No other site can reach this one, as behind NAT: it dials, also where a machine comes here
    #[arg(long)]
    behind_nat: bool,
    /// Bytes that the pool may hold on disk, e.g. 20G [default: 64G]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pool_limit: Option<u64>,
    /// Memory for substrates that no machine runs from, e.g. 1G; they are made again from the pool
    /// when it is full [default: half of the tmpfs]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_cache: Option<u64>,
    /// Memory that may be kept of machines that have left, for when they come back, e.g. 1G; it makes
    /// room for whatever needs some [default: a quarter of the above]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_visits: Option<u64>,
    /// Memory that its machines may be promised, e.g. 48G; each is promised all of its own and what
    /// its QEMU takes, however little it has written to [default: what the host has]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    memory_promise: Option<u64>,
    #[command(flatten)]
    living: Living,
}

/// `godwit relay`.
#[derive(Debug, Args)]
pub(crate) struct RelayRole {
    /// The configuration, JSON
    config: PathBuf,
    /// It is on standard input; CONFIG is only its name
    #[arg(long)]
    given: bool,
}

/// What a center answers behind its API's socket.
fn served(api: &Api) -> Routes {
    api.v1().and(api.metrics()).and(api.health())
}

impl CenterRole {
    pub(crate) async fn run(self) -> Result {
        self.living.begin()?;
        let dirs = self.places.dirs(&self.name);
        let _lock = Lock::take(&dirs, &self.name)?;
        let client = client_files(self.config.as_ref());
        let mut ends = Ends::new()?;
        let config = CenterConfig {
            site: self.name,
            dirs,
            api: self.api,
            link: self.link,
            advertise: self.advertise,
            client: client.clone(),
            pool_bytes: self.pool_limit,
            memory_cache_bytes: self.memory_cache,
            memory_visits_bytes: self.memory_visits,
            memory_promise_bytes: self.memory_promise,
            link_patience: self.living.link_patience.map(Duration::from_secs),
            scrub_every: self.living.scrub_every.map(Duration::from_secs),
            tls: self
                .tls_cert
                .zip(self.tls_key)
                .map(|(certificate, key)| TlsFiles { certificate, key }),
            certificate_life: self.certificate_life,
            co_schedule: !self.living.no_co_scheduling,
            uids: self.living.uid_range,
            publish_ports: self.living.publish_ports,
        };
        let center = tokio::select! {
            c = Box::pin(Center::start(config, served)) => c?,
            () = ends.wait() => return Ok(Outcome::Done),
        };
        copy_secret(&client.token(), self.token_file.as_deref())?;
        copy_secret(&client.ca(), self.ca_file.as_deref())?;
        notify("READY=1");
        ends.wait().await;
        notify("STOPPING=1");
        center.stop().await;
        Ok(Outcome::Done)
    }
}

impl ApRole {
    pub(crate) async fn run(self) -> Result {
        self.living.begin()?;
        let token = self.join.as_deref().map(read_join_token).transpose()?;
        let named = token
            .as_deref()
            .map(str::parse::<JoinToken>)
            .transpose()
            .map_err(|e| Failure::usage(e.to_string()))?
            .map(|t| t.site);
        let name = match (self.name, named) {
            (Some(n), Some(t)) if n != t => {
                return Err(Failure::usage(format!("the join token is for site '{t}', not '{n}'"))
                    .hint(format!("make one for it: godwit site token {n}")));
            }
            (Some(n), _) | (None, Some(n)) => n,
            (None, None) => {
                return Err(Failure::usage("which site is this?").hint("name it with --name"));
            }
        };
        let dirs = self.places.dirs(&name);
        let _lock = Lock::take(&dirs, &name)?;
        let mut ends = Ends::new()?;
        if !identity_of(&dirs).exists() {
            let Some(token) = token else {
                return Err(Failure::new(Code::Conflict, format!("site '{name}' has not joined"))
                    .hint(format!(
                        "at the center: godwit site token {name} > FILE; then here: --join @FILE"
                    )));
            };
            join_site(&token, &dirs).await?;
        }
        let tls = self.tls_cert.zip(self.tls_key);
        let tls = tls.map(|(certificate, key)| TlsFiles { certificate, key });
        let ca_file = self.ca_file;
        let config = AgentConfig {
            dirs,
            api: self.api.map(|listen| FrontConfig { listen, tls, ca_file }),
            link: self.link,
            pool_bytes: self.pool_limit,
            memory_cache_bytes: self.memory_cache,
            memory_visits_bytes: self.memory_visits,
            memory_promise_bytes: self.memory_promise,
            link_patience: self.living.link_patience.map(Duration::from_secs),
            behind_nat: self.behind_nat,
            scrub_every: self.living.scrub_every.map(Duration::from_secs),
            co_schedule: !self.living.no_co_scheduling,
            uids: self.living.uid_range,
            publish_ports: self.living.publish_ports,
        };
        let mut agent = tokio::select! {
            a = Box::pin(Agent::start(config)) => a?,
            () = ends.wait() => return Ok(Outcome::Done),
        };
        // It serves its machines; the center may be away for as long as it likes.
        notify("READY=1");
        notify("STATUS=looking for the center");
        tokio::select! {
            () = agent.follow(|connected| {
                let status = if connected { "at its center" } else { "looking for the center" };
                notify(&format!("STATUS={status}"));
            }) => {}
            () = ends.wait() => {}
        }
        notify("STOPPING=1");
        agent.stop().await;
        Ok(Outcome::Done)
    }
}

impl RelayRole {
    pub(crate) async fn run(self) -> Result {
        Living::default().begin()?;
        let config = match self.given {
            true => RelayConfig::read(std::io::stdin(), &self.config),
            false => RelayConfig::load(&self.config),
        };
        let config = config.map_err(|e| Fault::of(&e))?;
        let status = Box::pin(run_relay(config)).await.map_err(|e| Fault::of(&e))?;
        tracing::info!(?status, "relay ended");
        Ok(Outcome::Done)
    }
}

impl Living {
    /// Starts the log, and a session of its own when that is asked for.
    fn begin(&self) -> Result<()> {
        if self.own_session {
            rustix::process::setsid()
                .map_err(|e| Failure::internal(format!("leaving the caller's session: {e}")))?;
        }
        let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
        let colours = std::io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(colours)
            .with_writer(std::io::stderr);
        let begun = if self.log_json { log.json().try_init() } else { log.try_init() };
        begun.map_err(|e| Failure::internal(format!("starting the log: {e}")))
    }
}

/// The signals that end a role in good order.
struct Ends {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    hup: tokio::signal::unix::Signal,
}

impl Ends {
    fn new() -> Result<Self> {
        let on = |kind| {
            signal(kind).map_err(|e| Failure::internal(format!("listening for signals: {e}")))
        };
        Ok(Self {
            term: on(SignalKind::terminate())?,
            int: on(SignalKind::interrupt())?,
            hup: on(SignalKind::hangup())?,
        })
    }

    /// A role outlives its terminal: SIGHUP, which would end it, only has files read again.
    async fn wait(&mut self) {
        loop {
            tokio::select! {
                _ = self.term.recv() => return,
                _ = self.int.recv() => return,
                _ = self.hup.recv() => {
                    tracing::info!("SIGHUP: the operator's own certificate is read again, if there is one; nothing else is");
                }
            }
        }
    }
}

/// Tells a service manager (`sd_notify(3)`), if there is one.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => std::os::unix::net::SocketAddr::from_abstract_name(name),
        None => std::os::unix::net::SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|a| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &a));
    if let Err(error) = sent {
        tracing::debug!(%error, state, "the service manager is not told");
    }
}

/// Where a site's certificate and key are once it has joined.
pub(super) fn identity_of(dirs: &SiteDirs) -> PathBuf {
    dirs.keys().join("identity")
}

/// A join token as given: itself, `@FILE`, or `-` for stdin. One that is a word of this process's
/// command line is taken, with a warning: everybody on this machine could read it.
pub(super) fn read_join_token(text: &str) -> Result<String> {
    if text.starts_with("gwj") && std::env::args().any(|word| word.contains(text)) {
        crate::out::notice(
            "warning: everybody on this machine can read a token on a command line; \
             give it as @FILE, as - (standard input), or in GODWIT_JOIN_TOKEN",
        );
    }
    let mut out = String::new();
    let read = |mut from: Box<dyn Read>, out: &mut String| from.read_to_string(out);
    let done = match (text, text.strip_prefix('@')) {
        ("-", _) => read(Box::new(std::io::stdin().take(64 << 10)), &mut out),
        (_, Some(file)) => match std::fs::File::open(file) {
            Ok(f) => read(Box::new(f.take(64 << 10)), &mut out),
            Err(e) => Err(e),
        },
        _ => {
            out.push_str(text);
            Ok(0)
        }
    };
    done.map_err(|e| Failure::usage(format!("reading the join token from {text}: {e}")))?;
    Ok(out.trim().to_owned())
}

fn copy_secret(from: &Path, to: Option<&Path>) -> Result<()> {
    let Some(to) = to else { return Ok(()) };
    let failed = |e: std::io::Error| Failure::internal(format!("writing {}: {e}", to.display()));
    let text = std::fs::read(from).map_err(failed)?;
    // Made anew, so that an older file's mode does not count.
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(failed)?;
    file.write_all(&text).map_err(failed)
}

/// How long the lock of a daemon that was killed may be held: a program that it was just starting
/// has all its files until that program runs.
const LOCK_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);
/// How often it is tried meanwhile.
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// The one daemon of a site, for as long as this is held.
#[derive(Debug)]
struct Lock {
    _file: std::fs::File,
}

impl Lock {
    fn take(dirs: &SiteDirs, site: &Name) -> Result<Self> {
        dirs.make()?;
        let path = dirs.run.join(PID_FILE);
        let failed =
            |e: std::io::Error| Failure::internal(format!("making {}: {e}", path.display()));
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let deadline = std::time::Instant::now() + LOCK_WITHIN;
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if is_alive(&path) || std::time::Instant::now() >= deadline {
                return Err(Failure::new(
                    Code::Conflict,
                    format!("site '{site}' has a daemon already"),
                )
                .hint("stop it with: godwit down, or name another site's directories"));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        file.set_len(0).map_err(failed)?;
        write!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Whether the process that a daemon's file names is there.
fn is_alive(path: &Path) -> bool {
    std::fs::read_to_string(path)
        .ok()
        .and_then(|text| rustix::process::Pid::from_raw(text.trim().parse().ok()?))
        .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// The process of the daemon that has `run` as its run directory, if one lives.
pub(super) fn daemon_of(run: &Path) -> Option<rustix::process::Pid> {
    let path = run.join(PID_FILE);
    let file = std::fs::File::open(&path).ok()?;
    // A lock that can be had is one that no daemon holds.
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return None;
    }
    let pid = std::fs::read_to_string(&path).ok()?.trim().parse().ok()?;
    rustix::process::Pid::from_raw(pid)
}

/// The client's files that a center wrote to `dir`.
pub(super) fn written(dir: &Path) -> ClientFiles {
    ClientFiles { dir: dir.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_has_one_daemon() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = SiteDirs::below(dir.path());
        let cafe = Name::new("cafe").expect("name");
        assert_eq!(daemon_of(&dirs.run), None);
        let lock = Lock::take(&dirs, &cafe).expect("free");
        assert_eq!(Lock::take(&dirs, &cafe).expect_err("taken").exit, 5);
        let me = i32::try_from(std::process::id()).expect("pid");
        assert_eq!(daemon_of(&dirs.run), rustix::process::Pid::from_raw(me));
        drop(lock);
        assert_eq!(daemon_of(&dirs.run), None);
    }

    #[test]
    fn the_lock_of_a_daemon_that_was_killed_is_waited_for() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = SiteDirs::below(dir.path());
        let cafe = Name::new("cafe").expect("name");
        // What a child of it holds until it runs its program. Its process is gone.
        let lock = Lock::take(&dirs, &cafe).expect("free");
        let mut gone = std::process::Command::new("true").spawn().expect("a process");
        gone.wait().expect("ended");
        std::fs::write(dirs.run.join(PID_FILE), gone.id().to_string()).expect("written");
        let (begin, begun) = std::sync::mpsc::channel();
        let taker = std::thread::spawn(move || {
            begin.send(()).expect("heard");
            Lock::take(&dirs, &cafe).map(drop)
        });
        begun.recv().expect("it has begun");
        std::thread::sleep(3 * LOCK_PAUSE);
        assert!(!taker.is_finished(), "it waits");
        drop(lock);
        taker.join().expect("no panic").expect("free now");
    }

    #[test]
    fn join_tokens_come_from_files_too() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("t");
        std::fs::write(&file, "gwj1/abc\n").expect("write");
        assert_eq!(read_join_token(&format!("@{}", file.display())).expect("read"), "gwj1/abc");
        assert_eq!(read_join_token(" gwj1/x ").expect("itself"), "gwj1/x");
        assert_eq!(read_join_token("@/nowhere").expect_err("no file").exit, 2);
    }
}
