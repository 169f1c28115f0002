//! The two sites of the demo: a center and an AP in network namespaces, joined by a link, or both
//! on this host's loopback.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use godwit_types::Name;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::link::{Link, LinkHandle, LinkSpec, Side};
use crate::suites::mainjob::godwit::GodwitCli;

pub(crate) const CENTER: &str = "center";
pub(crate) const AP: &str = "cafe";

const START_WITHIN: Duration = Duration::from_secs(60);

/// What lies between the two sites.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Between {
    /// An emulated link.
    Link {
        /// Rate each way in Mbit/s.
        rate_mbit: f64,
        /// One-way delay in ms.
        delay_ms: f64,
    },
    /// Nothing: both are on this host's loopback.
    Loopback,
}

/// Both sites, from start to removal.
pub(crate) struct World {
    cli: GodwitCli,
    root: tempfile::TempDir,
    ram: tempfile::TempDir,
    center: Mutex<Option<Child>>,
    ap: Mutex<Option<Child>>,
    // Last: the namespaces go when nobody is in them any more.
    link: Option<LinkHandle>,
}

impl World {
    pub(crate) async fn start(program: &Path, between: Between) -> anyhow::Result<Self> {
        Self::with(program, between, &[]).await
    }

    /// As [`World::start`], with more words on the center's command line.
    pub(crate) async fn with(
        program: &Path,
        between: Between,
        center: &[&str],
    ) -> anyhow::Result<Self> {
        let words = center;
        let link = match between {
            Between::Link { rate_mbit, delay_ms } => {
                let name = Name::new(&format!("demo-{}", std::process::id()));
                let spec = LinkSpec::new(name.context("name the link")?, rate_mbit, delay_ms);
                Some(Link::create(spec)?)
            }
            Between::Loopback => None,
        };
        let root = tempfile::Builder::new().prefix("gwd").tempdir().context("make a place")?;
        let ram = tempfile::Builder::new()
            .prefix("godwit-demo-")
            .tempdir_in("/dev/shm")
            .context("make a place for guest memory")?;
        let config = root.path().join("config");
        let cli = GodwitCli {
            program: program.to_owned(),
            namespace: link.as_ref().map(LinkHandle::ns_a),
            env: vec![("GODWIT_CONFIG".into(), config.display().to_string())],
        };
        let [api, here, there] = match &link {
            Some(l) => [
                "127.0.0.1:7700".into(),
                format!("{}:7701", l.addr_a()),
                format!("{}:7701", l.addr_b()),
            ],
            None => free_ports()?.map(|port| format!("127.0.0.1:{port}")),
        };
        let command = |side| match &link {
            Some(l) => l.command(side, program),
            None => std::process::Command::new(program),
        };
        let mut first = command(Side::A);
        first.args(["center", "--name", CENTER, "--api", &api]);
        first.args(["--link", &here, "--config"]).arg(&config);
        first.args(words);
        let center = daemon(first, CENTER, root.path(), ram.path())?;
        let mut second = command(Side::B);
        let world =
            Self { cli, root, ram, center: Mutex::new(Some(center)), ap: Mutex::new(None), link };
        world.ready(CENTER).await?;
        let token = world.text(&["site", "token", AP], START_WITHIN).await?;
        second.args(["ap", "--name", AP, "--link", &there]);
        second.env("GODWIT_JOIN_TOKEN", token.trim());
        let ap = daemon(second, AP, world.root.path(), world.ram.path())?;
        *world.ap.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(ap);
        world.ready(AP).await?;
        let words = match between {
            Between::Link { rate_mbit, delay_ms } => {
                format!("link {rate_mbit} Mbit/s, {} ms round trip", 2.0 * delay_ms)
            }
            Between::Loopback => "both on this host's loopback".into(),
        };
        super::report::say(&format!("center and AP are up; {words}"))?;
        Ok(world)
    }

    /// The link between the sites.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn link(&self) -> anyhow::Result<&LinkHandle> {
        self.link.as_ref().context("the sites are not joined by a link of ours")
    }

    /// Connects to an address of the center's loopback.
    pub(crate) fn connect(&self, to: std::net::SocketAddr) -> anyhow::Result<std::net::TcpStream> {
        let connect = || std::net::TcpStream::connect(to);
        let stream = match &self.link {
            Some(link) => link.enter(Side::A, connect)?,
            None => connect(),
        };
        stream.with_context(|| format!("connect to {to}"))
    }

    /// Bytes that both ends have put on the link so far, headers and what was lost included; none
    /// on loopback.
    pub(crate) fn link_bytes(&self) -> Option<u64> {
        self.link.as_ref().map(|l| l.counters().offered_bytes())
    }

    pub(crate) fn cli(&self) -> GodwitCli {
        self.cli.clone()
    }

    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        args: &[&str],
        within: Duration,
    ) -> anyhow::Result<T> {
        self.cli.ask(args, within).await
    }

    /// Runs a command that answers nothing.
    pub(crate) async fn tell(&self, args: &[&str], within: Duration) -> anyhow::Result<()> {
        self.text(args, within).await.map(drop)
    }

    /// Runs a command and gives what it prints.
    pub(crate) async fn text(&self, args: &[&str], within: Duration) -> anyhow::Result<String> {
        let out = self.cli.run(args, within).await?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// Runs a program in a guest; its standard output.
    pub(crate) async fn exec(&self, vm: &str, program: &[&str]) -> anyhow::Result<String> {
        let mut args = vec!["vm", "exec", "--within", "120", vm, "--"];
        args.extend(program);
        self.text(&args, Duration::from_secs(150)).await
    }

    async fn ready(&self, site: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let sites: anyhow::Result<Vec<Value>> =
                self.cli.ask(&["site", "list"], START_WITHIN).await;
            let up = |v: &Value| v["name"] == site && v["state"] != "unreachable";
            match sites {
                Ok(all) if all.iter().any(up) => return Ok(()),
                Ok(_) | Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Ok(_) => anyhow::bail!(
                    "site {site} did not join within {START_WITHIN:?}: {}",
                    self.log(site)
                ),
                Err(e) => {
                    return Err(e.context(format!("wait for site {site}: {}", self.log(site))));
                }
            }
        }
    }

    fn log(&self, site: &str) -> String {
        let text = std::fs::read_to_string(self.root.path().join(format!("{site}.log")));
        let text = text.unwrap_or_default();
        text.lines().rev().take(3).collect::<Vec<_>>().join(" | ")
    }

    pub(super) async fn image(&self, name: &Name) -> anyhow::Result<Value> {
        self.cli.ask(&["image", "inspect", name.as_str()], START_WITHIN).await
    }

    pub(crate) async fn accel(&self) -> anyhow::Result<String> {
        let sites: Vec<Value> = self.cli.ask(&["site", "list"], START_WITHIN).await?;
        let center = sites.iter().find(|s| s["name"] == CENTER).context("find the center")?;
        let accel = center["report"]["accel"].as_str().or_else(|| center["accel"].as_str());
        Ok(accel.unwrap_or("unknown").to_owned())
    }

    /// Where a site has the sockets and logs of its machines.
    pub(crate) fn run_dir(&self, site: &str) -> PathBuf {
        self.root.path().join(site).join("run")
    }

    /// Where a site has the memory of its machines.
    pub(crate) fn memory_dir(&self, site: &str) -> PathBuf {
        self.ram.path().join(site)
    }

    /// Where both sites have those of their machines.
    pub(crate) fn run_dirs(&self) -> [PathBuf; 2] {
        [CENTER, AP].map(|site| self.run_dir(site))
    }

    /// Stops the AP's daemon and removes all that it kept.
    pub(super) async fn remove_ap(&self) -> anyhow::Result<()> {
        end(&self.ap);
        for dir in [self.root.path().join(AP), self.ram.path().join(AP)] {
            std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        ensure!(!self.root.path().join(AP).exists(), "the AP's files are still there");
        Ok(())
    }

    /// Copies the daemons' logs to where somebody will look.
    pub(crate) fn keep_logs(&self, out: &Path) {
        for site in [CENTER, AP] {
            let name = format!("{site}.log");
            let _ = std::fs::copy(self.root.path().join(&name), out.join(&name));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The machines outlive their daemon, so they are ended by their records first.
        for site in [CENTER, AP] {
            end_machines(&self.run_dir(site));
        }
        end(&self.ap);
        end(&self.center);
    }
}

/// Ports that nobody listens on now, all different.
fn free_ports() -> anyhow::Result<[u16; 3]> {
    let mut held = Vec::new();
    let mut ports = [0; 3];
    for port in &mut ports {
        // The links are UDP, the API is TCP; a port that is free for both serves either.
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        let at = tcp.local_addr().context("find a free port")?;
        let udp = std::net::UdpSocket::bind(at).context("find a free port")?;
        *port = at.port();
        held.push((tcp, udp));
    }
    Ok(ports)
}

fn end(child: &Mutex<Option<Child>>) {
    let child = child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(mut c) = child {
        let _ = c.kill();
        let _ = c.wait();
    }
}

fn end_machines(run: &Path) {
    let Ok(entries) = std::fs::read_dir(run) else { return };
    for entry in entries.flatten() {
        let record = std::fs::read(entry.path().join("machine.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&record).unwrap_or_default();
        let pid = record["process"]["pid"].as_i64().and_then(|p| i32::try_from(p).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn daemon(
    mut command: std::process::Command,
    site: &str,
    root: &Path,
    ram: &Path,
) -> anyhow::Result<Child> {
    let log = std::fs::File::create(root.join(format!("{site}.log"))).context("make a log")?;
    let err = log.try_clone().context("share a log")?;
    command
        .args(["--root"])
        .arg(root)
        .arg("--ram")
        .arg(ram.join(site))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(err)
        .spawn()
        .with_context(|| format!("start site {site}"))
}
