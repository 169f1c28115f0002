//! Guests: the images of the image cache, and what is asked of them by their agents.

use std::path::PathBuf;
use std::time::Duration;

use godwit_image::{Image, ImageCache};
use godwit_qemu::{BootFile, Launch, Machine, MachineSpec, Start};
use godwit_types::Name;

/// Long enough for anything on two busy cores.
pub const LONG: Duration = Duration::from_secs(120);

/// Whether the guest's kernel has noticed that it is a copy, as a shell condition.
pub const RESEEDED: &str = "dmesg | grep -q 'due to virtual machine fork'";

/// A guest image as the image cache keeps it.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The machine that it is made for.
    pub spec: MachineSpec,
    /// Its disk.
    pub base: PathBuf,
    /// All of it.
    pub image: Image,
}

/// The image `name`, or `None` when it was not built on this machine.
#[must_use]
pub fn guest(name: &str) -> Option<Guest> {
    let name = Name::new(name).expect("a name");
    let i = ImageCache::open(crate::images()).and_then(|c| c.get(&name)).ok()?;
    let spec = MachineSpec {
        arch: i.arch,
        memory: i.memory,
        vcpus: i.vcpus,
        kernel: BootFile { path: i.kernel_path(), hash: i.kernel.hash },
        initrd: i
            .initrd_path()
            .zip(i.initrd.as_ref())
            .map(|(path, file)| BootFile { path, hash: file.hash }),
        cmdline: i.cmdline.clone(),
        display: i.display,
        disk: true,
        nic_ports: MachineSpec::DEFAULT_NIC_PORTS,
    };
    Some(Guest { spec, base: i.disk_path().expect("an image with a disk"), image: i })
}

/// The tiny guest.
#[must_use]
pub fn tiny() -> Guest {
    guest("tiny").expect("the tests need the tiny guest: run 'godwit image build tiny' first")
}

/// The same machine, waiting for a state.
#[must_use]
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
    let deadline = tokio::time::Instant::now() + LONG;
    while let Err(e) = machine.agent().ping(LONG).await {
        let late = tokio::time::Instant::now() >= deadline;
        assert!(!late, "{e}; the console says {:?}", console(machine));
    }
}

/// The last that the guest wrote to its console.
#[must_use]
pub fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.console_tail(2000).unwrap_or_default()).into_owned()
}

/// A machine that ends with the test, however the test ends.
#[derive(Debug)]
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

/// Starts a machine that ends with the test.
pub async fn start(launch: Launch) -> Guarded {
    Guarded(launch.spawn().await.expect("a machine"))
}
