//! Guests for the system tests: the `tiny` images of the image cache.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part")]

mod leftover;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_qemu::{BootFile, DiskChain, Launch, Layer, Machine, MachineSpec, MemorySource, Start};
use godwit_types::{Arch, Mib};
use leftover::EndsGuests;
use serde_json::Value;

/// Long enough for anything on two busy cores.
pub const LONG: Duration = Duration::from_secs(120);

/// Whether the guest's kernel has noticed that it is a copy, as a shell condition.
pub const RESEEDED: &str = "dmesg | grep -q 'due to virtual machine fork'";

/// A guest image as the image cache keeps it.
pub struct Guest {
    pub spec: MachineSpec,
    pub base: PathBuf,
}

/// The image `name`, or `None` when it was not built on this machine.
pub fn guest(name: &str) -> Option<Guest> {
    let cache = std::env::var_os("GODWIT_IMAGES")
        .map_or_else(|| PathBuf::from("/var/cache/godwit/images"), PathBuf::from);
    let dir = cache.join(name).canonicalize().ok()?;
    let image: Value =
        serde_json::from_slice(&std::fs::read(dir.join("image.json")).ok()?).expect("image.json");
    let image = &image["contents"];
    let file = |key: &str| {
        let path = dir.join(image[key]["file"].as_str().expect("a file name"));
        let hash = image[key]["hash"].as_str().expect("a hash").parse().expect("a hash");
        BootFile { path, hash }
    };
    let number = |key: &str| image[key].as_u64().expect("a number");
    let spec = MachineSpec {
        arch: if image["arch"] == "aarch64" { Arch::Aarch64 } else { Arch::X86_64 },
        memory: Mib(u32::try_from(number("memory")).expect("small")),
        vcpus: u8::try_from(number("vcpus")).expect("small"),
        kernel: file("kernel"),
        initrd: Some(file("initrd")),
        cmdline: image["cmdline"].as_str().expect("a text").to_owned(),
        display: image["display"] == true,
        disk: true,
        nic_ports: 2,
    };
    Some(Guest { spec, base: file("disk").path })
}

/// The tiny guest.
pub fn tiny() -> Guest {
    guest("tiny").expect("the tests need the tiny guest: run 'godwit image build tiny' first")
}

/// A place for one test, gone afterwards. Memory files lie on tmpfs.
pub struct Place {
    _guests: EndsGuests,
    pub dir: tempfile::TempDir,
    pub shm: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self {
            _guests: EndsGuests::of(dir.path()),
            dir,
            shm: tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn memory(&self, name: &str) -> PathBuf {
        self.shm.path().join(name)
    }

    /// A fresh cow image for `base`, without any path in its header.
    pub fn cow(&self, name: &str, base: &Path) -> PathBuf {
        let path = self.path(name);
        let bytes = std::fs::metadata(base).expect("a base image").len().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().expect("UTF-8"), &bytes]);
        path
    }

    /// A launch of `guest` with memory of its own over `layers`.
    pub fn launch(&self, name: &str, guest: &Guest) -> Launch {
        let top = self.cow(&format!("{name}.qcow2"), &guest.base);
        let base = Layer::Raw { path: guest.base.clone() };
        Launch {
            disk: Some(DiskChain::over(vec![base], top)),
            ..Launch::new(
                guest.spec.clone(),
                self.path(name),
                name.parse().expect("a name"),
                MemorySource::Shared { path: self.memory(name) },
            )
        }
    }
}

pub fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).status().expect("qemu-img");
    assert!(done.success(), "qemu-img {args:?}");
}

/// A read-only NBD server of what `image` says, listening on `socket` until it is dropped.
pub async fn serve(socket: &Path, image: &[&str]) -> tokio::process::Child {
    let server = tokio::process::Command::new("qemu-nbd")
        .args(["-r", "-t", "-k"])
        .arg(socket)
        .args(image)
        .kill_on_drop(true)
        .spawn()
        .expect("qemu-nbd");
    let deadline = Instant::now() + LONG;
    while tokio::net::UnixStream::connect(socket).await.is_err() {
        assert!(Instant::now() < deadline, "qemu-nbd does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server
}

/// The same machine, waiting for a state.
pub fn incoming(launch: Launch) -> Launch {
    Launch { start: Start::Incoming, ..launch }
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
    if let Err(e) = machine.agent().ping(LONG).await {
        panic!("{e}; the console says {:?}", console(machine));
    }
}

pub fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.console_tail(2000).unwrap_or_default()).into_owned()
}
