//! Two sites, and a machine on its way from one to the other.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use godwit_disk::image::{Backing, create_overlay};
use godwit_migrate::hybrid::ArrivingDisk;
use godwit_migrate::relay::{Given, Meeting, RelayCommand, RelayDisk, RelayRole, RelayStatus};
use godwit_migrate::{RelayClient, RelayConfig, RelayError, run_relay};
use godwit_qemu::{DiskChain, DiskLayer, Launch, Layer, MemorySource, Node, Start};
use godwit_transfer::{Authority, Identity};
use godwit_types::{Generation, MigrationId, Name};
use tokio::task::JoinHandle;

use crate::guest::{Guest, LONG, tiny};
use crate::place::Place;

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Sites `center`, which the machine leaves, and `cafe`, with a key each.
#[derive(Debug)]
pub struct Sites {
    /// Where they keep their files.
    pub place: Place,
    /// The move.
    pub migration: MigrationId,
    /// What moves.
    pub guest: Guest,
}

impl Default for Sites {
    fn default() -> Self {
        Self::new()
    }
}

impl Sites {
    /// Two that trust each other.
    #[must_use]
    pub fn new() -> Self {
        let place = Place::new();
        let authority = Authority::create(&place.path("ca")).expect("an authority");
        for site in ["center", "cafe"] {
            authority.own_identity(&place.path(site), &name(site)).expect("an identity");
        }
        Self { place, migration: MigrationId::new(), guest: tiny() }
    }

    /// A file or socket of that name.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    fn disk_bytes(&self) -> u64 {
        std::fs::metadata(&self.guest.base).expect("a base image").len()
    }

    fn launch(&self, end: &str, below: Layer) -> Launch {
        let top = self.path(&format!("{end}.qcow2"));
        create_overlay(&top, Backing::Raw(&self.guest.base), self.disk_bytes()).expect("a cow");
        Launch {
            disk: Some(DiskChain::over(vec![below], top)),
            ..Launch::new(
                self.guest.spec.clone(),
                self.path(end),
                name(end),
                MemorySource::Shared { path: self.place.memory(end) },
            )
        }
    }

    fn base(&self) -> Layer {
        Layer::Raw { path: self.guest.base.clone() }
    }

    /// The machine at the source.
    #[must_use]
    pub fn source(&self) -> Launch {
        self.launch("source", self.base())
    }

    /// The machine that waits at the destination; its disk is the destination relay's.
    #[must_use]
    pub fn target(&self) -> Launch {
        let remote = Layer::Nbd { socket: self.path("nbd") };
        Launch { start: Start::Incoming, ..self.launch("target", remote) }
    }

    /// The chain below the target's top when the source is not needed any more.
    #[must_use]
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
            held: None,
            visit: None,
            own: None,
            given: None,
        }
    }

    /// Configuration of the destination's relay.
    #[must_use]
    pub fn destination_config(&self, resume: bool) -> RelayConfig {
        let disk = RelayDisk::Destination {
            base: self.guest.base.clone(),
            mid: self.path("mid.qcow2"),
            bytes: self.disk_bytes(),
            nbd: self.path("nbd"),
            written: self.path("written"),
        };
        let meeting = Meeting::Listen(([127, 0, 0, 1], 0).into());
        self.config(RelayRole::Destination, meeting, disk, resume)
    }

    /// Configuration of the source's relay.
    #[must_use]
    pub fn source_config(&self, destination: SocketAddr, resume: bool) -> RelayConfig {
        let disk = RelayDisk::Source {
            base: self.guest.base.clone(),
            index: None,
            layers: vec![self.path("source.qcow2")],
        };
        self.config(RelayRole::Source, Meeting::Dial(destination), disk, resume)
    }
}

/// Has a destination's relay inherit what a daemon gives it, `commit` for its word among it.
pub fn give(config: &mut RelayConfig, commit: File) {
    let Some(RelayDisk::Destination { nbd, .. }) = &config.disk else { panic!("no destination") };
    let listen = |path: &std::path::Path| {
        // What a relay before has left.
        let _ = std::fs::remove_file(path);
        UnixListener::bind(path).expect("a socket").into_raw_fd()
    };
    let identity = Identity::load(&config.keys).expect("an identity");
    let identity = Given::identity(&identity).expect("in memory");
    config.given = Some(Given {
        control: listen(&config.control),
        identity: identity.into_raw_fd(),
        nbd: Some(listen(nbd)),
        commit: Some(commit.into_raw_fd()),
        ..Given::default()
    });
}

/// A relay in a task of this process, and its client.
#[derive(Debug)]
pub struct Relay {
    /// How it is asked.
    pub client: RelayClient,
    /// What it ends with.
    pub task: JoinHandle<Result<RelayStatus, RelayError>>,
}

impl Relay {
    /// Starts one.
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

    /// Where it listens, once it does.
    pub async fn listening(&self) -> SocketAddr {
        let status = self.client.wait(|s| s.listening.is_some()).await.expect("a relay");
        status.listening.expect("an address")
    }

    /// Lets it end, and gives what it did.
    pub async fn finish(self) -> RelayStatus {
        assert!(self.client.command(&RelayCommand::Finish).await.expect("a relay"));
        self.task.await.expect("no panic").expect("a status")
    }
}
