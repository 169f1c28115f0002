//! `godwit up` and `godwit down`: a center and an AP of this machine, in the background.
//!
//! ```text
//! up: center started -> READY -> /healthz -> join token -> AP started -> READY -> site is ready
//! ```

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Args;
use godwit_cloud::daemon::ClientFiles;
use godwit_site::SiteDirs;
use godwit_types::{Code, Name, SiteKind, SiteState};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::role::{daemon_of, identity_of, written};
use super::site::{Seen, sites, token};
use crate::args::{Connect, Places, client_files, duration};
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Format};

/// How often a state that sends no event is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How many bytes of a log are looked at for the last words of a daemon that ended.
const LAST_WORDS: u64 = 2_000;

/// How long a daemon may take to end in good order.
const END_WITHIN: Duration = Duration::from_secs(30);

/// `godwit up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Name of the AP
    #[arg(long, default_value = "cafe")]
    ap: Name,
    /// Start no AP
    #[arg(long)]
    no_ap: bool,
    /// Where the API listens
    #[arg(long, default_value = "127.0.0.1:7700", value_name = "ADDR:PORT")]
    api: SocketAddr,
    /// Where other sites connect (UDP)
    #[arg(long, default_value = "127.0.0.1:7701", value_name = "ADDR:PORT")]
    link: SocketAddr,
    #[command(flatten)]
    scope: Scope,
    /// How long each of the two may take to be ready
    #[arg(long, value_parser = duration, default_value = "3m", value_name = "TIME")]
    timeout: Duration,
    /// Check and tell, change nothing
    #[arg(long)]
    dry_run: bool,
}

/// `godwit down`.
#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    scope: Scope,
    /// Tell what would be stopped
    #[arg(long)]
    dry_run: bool,
}

/// Whose daemons.
#[derive(Debug, Args)]
struct Scope {
    /// Put everything below DIR instead of /var/lib, /run and /dev/shm
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of token, certificate and address [default: ~/.config/godwit] [env: GODWIT_CONFIG]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

impl Scope {
    fn dirs(&self, site: &Name) -> SiteDirs {
        Places { root: self.root.clone(), ..Places::default() }.dirs(site)
    }

    /// The run directories of all sites.
    fn runs(&self) -> Vec<(String, PathBuf)> {
        let base = self.root.clone().unwrap_or_else(|| "/run/godwit".into());
        let Ok(entries) = std::fs::read_dir(&base) else { return Vec::new() };
        let mut all: Vec<_> = entries
            .filter_map(|e| {
                let e = e.ok()?;
                let site = e.file_name().into_string().ok()?;
                let run = if self.root.is_some() { e.path().join("run") } else { e.path() };
                Some((site, run))
            })
            .collect();
        all.sort();
        all
    }
}

impl Up {
    pub(crate) async fn run(self) -> Result {
        let center_site = Name::new("center").map_err(|e| Failure::internal(e.to_string()))?;
        let center = self.scope.dirs(&center_site);
        let ap = self.scope.dirs(&self.ap);
        if self.ap == center_site && !self.no_ap {
            return Err(Failure::usage("the AP needs a name of its own")
                .hint("'center' is the center's own site"));
        }
        let mut center_runs = daemon_of(&center.run).is_some();
        let ap_runs = self.no_ap || daemon_of(&ap.run).is_some();
        if self.dry_run {
            let mut sites = vec![(&center_site, center_runs)];
            if !self.no_ap {
                sites.push((&self.ap, ap_runs));
            }
            for (name, runs) in sites {
                let what = if runs { "leave as it is" } else { "start" };
                out::line(&format!("would: {what} {name}"))?;
            }
            return Ok(Outcome::Done);
        }
        let files = client_files(self.scope.config.as_ref());
        let mut reported = Vec::new();
        if center_runs && !self.stays(&center, &files).await? {
            center_runs = false;
        }
        if !center_runs {
            let mut command = self.role("center", &center_site, &center)?;
            command.arg("--api").arg(self.api.to_string());
            command.arg("--link").arg(self.link.to_string());
            command.arg("--config").arg(&files.dir);
            start(command, &center, "center", self.timeout).await?;
        }
        let connect = Connect { config: Some(files.dir.clone()), ..Connect::default() };
        let client = Client::open(&connect)?;
        until(self.timeout, "the center to answer", async || client.alive().await.then_some(()))
            .await?;
        let where_token = written(&files.dir).token();
        self.report(
            &mut reported,
            &format!(
                "center  ready   {}   (operator token in {})",
                client.base(),
                where_token.display()
            ),
            json!({ "site": center_site, "state": "ready", "api": client.base(),
                "token_file": where_token }),
        )?;
        if !self.no_ap {
            if identity_of(&ap).exists() {
                self.not_revoked(&sites(&client).await?)?;
            }
            if !ap_runs {
                let mut command = self.role("ap", &self.ap, &ap)?;
                if !identity_of(&ap).exists() {
                    let hour = Duration::from_secs(3600);
                    let t = token(&client, &self.ap, SiteKind::Ap, hour).await?;
                    // In the environment: a command line is read by everybody on this machine.
                    command.env("GODWIT_JOIN_TOKEN", t.token);
                }
                start(command, &ap, self.ap.as_str(), self.timeout).await?;
            }
            let cafe: Seen = until(self.timeout, "the AP to report to the center", async || {
                let all = sites(&client).await.ok()?;
                if let Err(f) = self.not_revoked(&all) {
                    return Some(Err(f));
                }
                let ready = |s: &Seen| s.record.name == self.ap && s.state == SiteState::Ready;
                all.into_iter().find(ready).map(Ok)
            })
            .await
            .and_then(|seen| seen)
            .map_err(|f| {
                if f.exit != Code::TimedOut.exit_code() {
                    return f;
                }
                f.hint(format!(
                    "see {}; was '{}' joined to another center?",
                    log_of(&ap).display(),
                    self.ap
                ))
            })?;
            let rtt = cafe.record.report.rtt_ms;
            let words = format!(
                "{:6}  joined  {}",
                self.ap,
                rtt.map(|ms| format!("round trip {}", out::millis(ms))).unwrap_or_default()
            );
            let data = json!({ "site": self.ap, "state": "ready", "rtt_ms": rtt });
            self.report(&mut reported, words.trim_end(), data)?;
        }
        if matches!(self.scope.output, Format::Json | Format::Yaml) {
            out::value(self.scope.output, &reported)?;
        }
        Ok(if center_runs && ap_runs { Outcome::Unchanged } else { Outcome::Done })
    }

    /// Whether a center that seems to run answers, or is only just ending: one that was killed
    /// holds its lock a little longer.
    async fn stays(&self, center: &SiteDirs, files: &ClientFiles) -> Result<bool> {
        let connect = Connect { config: Some(files.dir.clone()), ..Connect::default() };
        let client = Client::open(&connect)?;
        until(self.timeout, "the center to answer", async || {
            if client.alive().await {
                return Some(true);
            }
            daemon_of(&center.run).is_none().then_some(false)
        })
        .await
    }

    /// Refuses an AP that the center has thrown out: it never comes to be ready.
    fn not_revoked(&self, all: &[Seen]) -> Result<()> {
        let revoked = |s: &Seen| s.record.name == self.ap && s.record.revoked;
        if !all.iter().any(revoked) {
            return Ok(());
        }
        let root = self.scope.root.as_ref().map(|r| format!(" --root {}", r.display()));
        Err(Failure::new(Code::Conflict, format!("site '{}' was revoked", self.ap)).hint(format!(
            "let it join anew: godwit site token {}, then godwit site join --replace TOKEN{}; or \
             leave it out with --no-ap",
            self.ap,
            root.unwrap_or_default()
        )))
    }

    fn report(&self, reported: &mut Vec<Value>, words: &str, data: Value) -> Result<()> {
        match self.scope.output {
            Format::Table | Format::Wide => out::line(words)?,
            Format::Name => out::line(data["site"].as_str().unwrap_or_default())?,
            Format::Json | Format::Yaml => {}
        }
        reported.push(data);
        Ok(())
    }

    fn role(&self, role: &str, site: &Name, dirs: &SiteDirs) -> Result<Command> {
        let program = std::env::current_exe()
            .map_err(|e| Failure::internal(format!("finding this program: {e}")))?;
        let mut command = Command::new(program);
        command.arg(role).arg("--own-session").arg("--name").arg(site.as_str());
        for (flag, dir) in [
            ("--data", &dirs.data),
            ("--run", &dirs.run),
            ("--ram", &dirs.memory),
            ("--images", &dirs.images),
        ] {
            command.arg(flag).arg(dir);
        }
        Ok(command)
    }
}

fn log_of(dirs: &SiteDirs) -> PathBuf {
    dirs.data.join("daemon.log")
}

/// Starts a daemon in the background and waits until it says that it serves.
async fn start(mut command: Command, dirs: &SiteDirs, name: &str, within: Duration) -> Result<()> {
    dirs.make()?;
    let path = log_of(dirs);
    let failed = |e: std::io::Error| Failure::internal(format!("opening {}: {e}", path.display()));
    let log =
        OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(failed)?;
    let begin = log.metadata().map_err(failed)?.len();
    let socket = dirs.run.join("up.sock");
    // A leftover of an `up` that was killed.
    let _ = std::fs::remove_file(&socket);
    let notify = UnixDatagram::bind(&socket)
        .map_err(|e| Failure::internal(format!("listening on {}: {e}", socket.display())))?;
    let mut child = command
        .env("NOTIFY_SOCKET", &socket)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .spawn()
        .map_err(|e| Failure::internal(format!("starting {name}: {e}")))?;
    let outcome = tokio::time::timeout(within, ready(&mut child, &notify)).await;
    // It has served its purpose.
    let _ = std::fs::remove_file(&socket);
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => {
            let words = last_words(&path, begin);
            Err(Failure::unavailable(format!("{name} {why}{words}"))
                .hint(format!("its log is {}", path.display())))
        }
        Err(_) => {
            // Not ready is not up: it must not linger half-started.
            let _ = child.kill().await;
            let words = last_words(&path, begin);
            Err(Failure::new(
                Code::TimedOut,
                format!("{name} was not ready within {within:?}{words}"),
            )
            .hint(format!("its log is {}; give it more with --timeout", path.display())))
        }
    }
}

async fn ready(child: &mut Child, notify: &UnixDatagram) -> Result<(), String> {
    let mut message = [0u8; 256];
    loop {
        tokio::select! {
            n = notify.recv(&mut message) => {
                let n = n.map_err(|e| format!("cannot be heard: {e}"))?;
                if message[..n].split(|b| *b == b'\n').any(|l| l == b"READY=1") {
                    return Ok(());
                }
            }
            ended = child.wait() => {
                let how = ended.map_or_else(|e| e.to_string(), |s| s.to_string());
                return Err(format!("ended at once ({how})"));
            }
        }
    }
}

/// What a daemon wrote to its log since `begin`, shortened to its end.
fn last_words(log: &Path, begin: u64) -> String {
    let mut text = Vec::new();
    let read = std::fs::File::open(log).and_then(|mut f| {
        let end = f.seek(SeekFrom::End(0))?;
        f.seek(SeekFrom::Start(begin.max(end.saturating_sub(LAST_WORDS))))?;
        f.take(LAST_WORDS).read_to_end(&mut text)
    });
    let text = String::from_utf8_lossy(&text);
    match read {
        Ok(_) if !text.trim().is_empty() => format!(":\n{}", text.trim()),
        _ => String::new(),
    }
}

/// Looks at a state until it is there.
async fn until<T>(
    within: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(t) = look().await {
            return Ok(t);
        }
        if Instant::now() >= deadline {
            return Err(Failure::new(Code::TimedOut, format!("waited {within:?} for {what}")));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Down {
    pub(crate) async fn run(self) -> Result {
        let living: Vec<(String, PathBuf, Pid)> = self
            .scope
            .runs()
            .into_iter()
            .filter_map(|(site, run)| daemon_of(&run).map(|pid| (site, run, pid)))
            .collect();
        let mut reported = Vec::new();
        // The center last, so that the others can say goodbye.
        let (centers, others): (Vec<_>, Vec<_>) =
            living.into_iter().partition(|(s, ..)| s == "center");
        for (site, run, pid) in others.into_iter().chain(centers) {
            if self.dry_run {
                out::line(&format!("would: stop {site}"))?;
                continue;
            }
            end(&site, &run, pid).await?;
            match self.scope.output {
                Format::Table | Format::Wide => out::line(&format!("{site:6}  stopped"))?,
                Format::Name => out::line(&site)?,
                Format::Json | Format::Yaml => {}
            }
            reported.push(json!({ "site": site, "state": "stopped" }));
        }
        if matches!(self.scope.output, Format::Json | Format::Yaml) {
            out::value(self.scope.output, &reported)?;
        } else if reported.is_empty() && !self.dry_run {
            out::notice("nothing is up there (started with --root? name it again)");
        }
        Ok(if reported.is_empty() && !self.dry_run { Outcome::Unchanged } else { Outcome::Done })
    }
}

/// Asks a daemon to end and waits until it has let go of its site.
async fn end(site: &str, run: &Path, pid: Pid) -> Result<()> {
    match kill_process(pid, Signal::TERM) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(e) => return Err(Failure::internal(format!("stopping {site}: {e}"))),
    }
    let what = format!("{site} (process {pid:?}) to end");
    until(END_WITHIN, &what, async || daemon_of(run).is_none().then_some(())).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_ends_at_once_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = SiteDirs::below(dir.path());
        let mut sh = Command::new("sh");
        sh.args(["-c", "echo the port is taken >&2; exit 3"]);
        let f = start(sh, &dirs, "center", Duration::from_secs(60)).await.expect_err("ended");
        let words = f.words();
        assert!(words.contains("ended at once") && words.contains("the port is taken"), "{words}");
    }

    #[tokio::test]
    async fn waiting_ends_at_the_deadline() {
        let none = until(Duration::from_millis(1), "nothing", async || None::<()>).await;
        assert_eq!(none.expect_err("late").exit, 124);
        assert_eq!(until(Duration::ZERO, "it", async || Some(7)).await, Ok(7));
    }
}
