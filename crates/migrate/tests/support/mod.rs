//! Two sites on this machine for the system tests: the `tiny` guest, identities, relays.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use godwit_disk::image::{Backing, create_overlay};
use godwit_migrate::hybrid::ArrivingDisk;
use godwit_migrate::relay::{Meeting, RelayDisk, RelayRole, RelayStatus};
use godwit_migrate::{RelayClient, RelayConfig, RelayError, run_relay};
use godwit_qemu::{
    BootFile, DiskChain, DiskLayer, Launch, Layer, Machine, MachineSpec, MemorySource, Node, Start,
};
use godwit_transfer::Authority;
use godwit_types::{Arch, Generation, Mib, MigrationId, Name};
use serde_json::Value;
use tokio::task::JoinHandle;

/// Long enough for anything on two busy cores.
pub const LONG: Duration = Duration::from_secs(120);

/// Where relays listen.
pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A guest image as the image cache keeps it.
pub struct Guest {
    pub spec: MachineSpec,
    pub base: PathBuf,
}

/// The tiny guest.
pub fn tiny() -> Guest {
    let cache = std::env::var_os("GODWIT_IMAGES")
        .map_or_else(|| PathBuf::from("/var/cache/godwit/images"), PathBuf::from);
    let dir = cache.join("tiny").canonicalize().expect("'godwit image build tiny' was not run");
    let text = std::fs::read(dir.join("image.json")).expect("image.json");
    let image: Value = serde_json::from_slice(&text).expect("image.json");
    let image = &image["contents"];
    let file = |key: &str| BootFile {
        path: dir.join(image[key]["file"].as_str().expect("a file name")),
        hash: image[key]["hash"].as_str().expect("a hash").parse().expect("a hash"),
    };
    let number = |key: &str| image[key].as_u64().expect("a number");
    let spec = MachineSpec {
        arch: Arch::X86_64,
        memory: Mib(u32::try_from(number("memory")).expect("small")),
        vcpus: u8::try_from(number("vcpus")).expect("small"),
        kernel: file("kernel"),
        initrd: Some(file("initrd")),
        cmdline: image["cmdline"].as_str().expect("a text").to_owned(),
        display: image["display"] == true,
        disk: true,
        nic_ports: 2,
    };
    Guest { spec, base: file("disk").path }
}

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Two sites and a machine on its way from one to the other.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub shm: tempfile::TempDir,
    pub migration: MigrationId,
    pub guest: Guest,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::create(&dir.path().join("ca")).expect("an authority");
        for site in ["center", "cafe"] {
            authority.own_identity(&dir.path().join(site), &name(site)).expect("an identity");
        }
        Self {
            dir,
            shm: tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs"),
            migration: MigrationId::new(),
            guest: tiny(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn disk_bytes(&self) -> u64 {
        std::fs::metadata(&self.guest.base).expect("a base image").len()
    }

    fn cow(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        create_overlay(&path, Backing::Raw(&self.guest.base), self.disk_bytes()).expect("a cow");
        path
    }

    pub fn base(&self) -> Layer {
        Layer::Raw { path: self.guest.base.clone() }
    }

    /// The machine at the source.
    pub fn source(&self) -> Launch {
        let top = self.cow("source.qcow2");
        Launch {
            disk: Some(DiskChain::over(vec![self.base()], top)),
            ..Launch::new(
                self.guest.spec.clone(),
                self.path("source"),
                name("source"),
                MemorySource::Shared { path: self.shm.path().join("source") },
            )
        }
    }

    /// The machine that waits at the destination; its disk is the destination relay's.
    pub fn target(&self) -> Launch {
        let top = self.cow("target.qcow2");
        let remote = Layer::Nbd { socket: self.path("nbd") };
        Launch {
            disk: Some(DiskChain::over(vec![remote], top)),
            start: Start::Incoming,
            ..Launch::new(
                self.guest.spec.clone(),
                self.path("target"),
                name("target"),
                MemorySource::Shared { path: self.shm.path().join("target") },
            )
        }
    }

    /// The chain below `top` when the source is not needed any more.
    pub fn pivot(&self) -> ArrivingDisk {
        let layers = vec![
            DiskLayer { node: Node::Base, layer: self.base() },
            DiskLayer { node: Node::Mid, layer: Layer::Qcow2 { path: self.path("mid.qcow2") } },
        ];
        ArrivingDisk { layers, filled: None, written: self.path("written") }
    }

    fn config(
        &self,
        role: RelayRole,
        meeting: Meeting,
        disk: RelayDisk,
        resume: bool,
    ) -> RelayConfig {
        let (end, keys, peer) = match role {
            RelayRole::Source => ("src", "center", "cafe"),
            RelayRole::Destination => ("dst", "cafe", "center"),
        };
        RelayConfig {
            role,
            meeting,
            migration: self.migration,
            generation: Generation(2),
            peer: name(peer),
            keys: self.path(keys),
            revoked: Default::default(),
            revoked_file: None,
            link_patience_ms: 30_000,
            control: self.path(&format!("{end}.ctl")),
            qemu: self.path(&format!("{end}.qemu")),
            resume,
            memory: true,
            disk: Some(disk),
            given: None,
        }
    }

    /// Configuration of the destination's relay.
    pub fn destination_config(&self, resume: bool) -> RelayConfig {
        let disk = RelayDisk::Destination {
            base: self.guest.base.clone(),
            mid: self.path("mid.qcow2"),
            bytes: self.disk_bytes(),
            nbd: self.path("nbd"),
            written: self.path("written"),
        };
        self.config(RelayRole::Destination, Meeting::Listen(LOOPBACK), disk, resume)
    }

    /// Configuration of the source's relay.
    pub fn source_config(&self, destination: SocketAddr, resume: bool) -> RelayConfig {
        self.source_that(Meeting::Dial(destination), resume)
    }

    /// The same of one that meets the destination's so.
    pub fn source_that(&self, meeting: Meeting, resume: bool) -> RelayConfig {
        let disk = RelayDisk::Source {
            base: self.guest.base.clone(),
            layers: vec![self.path("source.qcow2")],
        };
        self.config(RelayRole::Source, meeting, disk, resume)
    }
}

/// A relay in a task of this process, and its client.
pub struct Relay {
    pub client: RelayClient,
    pub task: JoinHandle<Result<RelayStatus, RelayError>>,
}

impl Relay {
    pub async fn start(config: RelayConfig) -> Self {
        let control = config.control.clone();
        let task = tokio::spawn(run_relay(config));
        let client = RelayClient::attach_within(&control, LONG).await.expect("a relay");
        Self { client, task }
    }

    /// As a SIGKILL: no word to anybody.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub async fn listening(&self) -> std::net::SocketAddr {
        let status = self.client.wait(|s| s.listening.is_some()).await.expect("a relay");
        status.listening.expect("an address")
    }

    pub async fn finish(self) -> RelayStatus {
        let finish = godwit_migrate::relay::RelayCommand::Finish;
        assert!(self.client.command(&finish).await.expect("a relay"));
        self.task.await.expect("no panic").expect("a status")
    }
}

/// Runs a shell line in the guest and gives what it printed.
pub async fn sh(machine: &Machine, line: &str) -> String {
    let out = machine
        .agent()
        .exec("/bin/busybox", &["sh", "-c", line], &[], b"", LONG)
        .await
        .unwrap_or_else(|e| panic!("'{line}' in the guest: {e}: {:?}", console(machine)));
    assert!(out.ok(), "'{line}' in the guest: {out:?}");
    out.text().trim().to_owned()
}

/// Waits until the guest's agent answers.
pub async fn up(machine: &Machine) {
    let deadline = tokio::time::Instant::now() + LONG;
    while let Err(e) = machine.agent().ping(LONG).await {
        let late = tokio::time::Instant::now() >= deadline;
        assert!(!late, "{e}; the console says {:?}", console(machine));
    }
}

pub fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.console_tail(2000).unwrap_or_default()).into_owned()
}

/// A machine that ends with the test, however the test ends.
pub struct Guarded(pub Machine);

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.process().kill();
    }
}

impl std::ops::Deref for Guarded {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        &self.0
    }
}

pub async fn start(launch: Launch) -> Guarded {
    Guarded(launch.spawn().await.expect("a machine"))
}
