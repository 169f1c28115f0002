//! A guest for measurements: an image as a machine, and the witness program in it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use godwit_image::{Image, ImageCache};
use godwit_qemu::{
    AgentError, BootFile, DiskChain, Launch, Layer, Machine, MachineSpec, MemorySource,
};
use godwit_types::Name;
use serde::Deserialize;

/// Where the witness keeps its file in a guest.
const WITNESS_FILE: &str = "/data/witness.log";
/// Shell words that set `tty` to the guest's serial console, where the witness shows its signs of
/// life.
pub(crate) const SIGNS: &str = "tty=/dev/ttyS0; [ -e $tty ] || tty=/dev/ttyAMA0";
/// The witness program in a guest.
pub(crate) const WITNESS: &str = "/usr/lib/godwit/godwit-witness";
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest image, ready to be launched.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The image.
    pub image: Image,
    spec: MachineSpec,
}

impl Guest {
    /// Takes the image `name` out of the cache at `images`.
    ///
    /// # Errors
    /// When there is no such image there.
    pub fn load(images: &Path, name: &Name) -> anyhow::Result<Self> {
        let image = ImageCache::open(images)?.get(name)?;
        let spec = MachineSpec {
            arch: image.arch,
            memory: image.memory,
            vcpus: image.vcpus,
            kernel: BootFile { path: image.kernel_path(), hash: image.kernel.hash },
            initrd: image
                .initrd_path()
                .zip(image.initrd.as_ref())
                .map(|(path, f)| BootFile { path, hash: f.hash }),
            cmdline: image.cmdline.clone(),
            display: image.display,
            disk: image.disk.is_some(),
            nic_ports: MachineSpec::DEFAULT_NIC_PORTS,
        };
        Ok(Self { image, spec })
    }

    /// A launch of this guest with an empty cow image on the base image; memory and cow image are
    /// made in `dir`.
    ///
    /// # Errors
    /// When the cow image cannot be made.
    pub async fn launch(&self, dir: &Path, name: Name) -> anyhow::Result<Launch> {
        let memory = MemorySource::Shared { path: dir.join("memory") };
        let mut launch = Launch::new(self.spec.clone(), dir.join("run"), name, memory);
        if let (Some(base), Some(file)) = (self.image.disk_path(), &self.image.disk) {
            let top: PathBuf = dir.join("cow.qcow2");
            let out = tokio::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&top)
                .arg(file.bytes.to_string())
                .output()
                .await
                .context("run qemu-img")?;
            let said = String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.success(), "qemu-img could not make {}: {said}", top.display());
            launch.disk = Some(DiskChain::over(vec![Layer::Raw { path: base }], top));
        }
        Ok(launch)
    }
}

/// Waits until the guest agent of `machine` answers.
///
/// # Errors
/// When it does not answer within `within`.
pub async fn first_answer(machine: &Machine, within: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match Box::pin(machine.agent().ping(left)).await {
            // An agent that just came up answers the flushes of its channel first.
            Err(AgentError::Refused { .. }) if !left.is_zero() => {}
            done => return done.context("wait for the guest's first answer"),
        }
    }
}

/// What the witness program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Witness {
    /// Steps of changed memory.
    pub steps: u64,
    /// Lines written.
    pub lines: u64,
    /// Whether every page holds what it must.
    pub memory_ok: bool,
    /// Largest gap between two heartbeats since the last reset, in ms, by the guest's own clock.
    pub max_gap_ms: f64,
    /// Memory that it keeps changing: noise, which nothing packs.
    pub memory_bytes: u64,
    /// Bytes of it that it has rewritten since the last reset.
    pub written_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Check {
    lines: u64,
    ok: bool,
}

impl Witness {
    /// A shell line that waits until the guest has come to rest (its processors idle for nine tenths
    /// of two seconds: a desktop goes on booting after its first answer), starts the program with
    /// `memory_mib` MiB of changing memory, and waits until it works.
    #[must_use]
    pub fn script(memory_mib: u32) -> String {
        format!(
            "busy=1; while [ $busy = 1 ]; do \
             read -r _ u n s i _ </proc/stat; was=$((u+n+s)); idle=$i; sleep 2; \
             read -r _ u n s i _ </proc/stat; \
             [ $((u+n+s-was)) -gt $(((i-idle)/9)) ] || busy=0; done; \
             mkdir -p /data; {SIGNS}; \
             /usr/lib/godwit/user-run {WITNESS} run --memory-mib {memory_mib} \
             --file {WITNESS_FILE} --signs $tty >/dev/null 2>&1; \
             until {WITNESS} status --reset | grep -q '\"lines\":[1-9]'; do sleep 0.1; done"
        )
    }

    /// What of a move's bytes is its own, at most: all of its memory once, and again what it changed
    /// until the machine stopped, no page more than `passes` times in all. `watched` is the time
    /// since the last reset, `until_stop` that of pre-copy.
    #[must_use]
    pub fn share(&self, watched: Duration, until_stop: Duration, passes: u64) -> u64 {
        let rate = self.written_bytes as f64 / watched.as_secs_f64().max(1e-3);
        let again = (rate * until_stop.as_secs_f64()) as u64;
        self.memory_bytes + again.min(self.memory_bytes * passes.saturating_sub(1))
    }

    /// Starts the program with `memory_mib` MiB of changing memory and waits until it works.
    ///
    /// # Errors
    /// When the agent does not answer or the program does not come up within `within`.
    pub async fn start(machine: &Machine, memory_mib: u32, within: Duration) -> anyhow::Result<()> {
        let script = Self::script(memory_mib);
        let args = ["-c", &script];
        let out = Box::pin(machine.agent().exec("/bin/sh", &args, &[], &[], within))
            .await
            .context("start the witness program in the guest")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.ok(), "the witness program did not start in the guest: {said}");
        Ok(())
    }

    /// Asks it; `reset` starts its largest gap anew.
    ///
    /// # Errors
    /// When the agent or the program does not answer.
    pub async fn status(machine: &Machine, reset: bool) -> anyhow::Result<Self> {
        let args: &[&str] = if reset { &["status", "--reset"] } else { &["status"] };
        ask(machine, args).await
    }

    /// Verifies every line of its file; gives their number.
    ///
    /// # Errors
    /// When a line is damaged or missing.
    pub async fn check_file(machine: &Machine) -> anyhow::Result<u64> {
        let found: Check = ask(machine, &["check", "--file", WITNESS_FILE]).await?;
        ensure!(found.ok, "the witness file is damaged after line {}", found.lines);
        Ok(found.lines)
    }
}

async fn ask<T: serde::de::DeserializeOwned>(
    machine: &Machine,
    args: &[&str],
) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    let out = loop {
        match Box::pin(machine.agent().exec(WITNESS, args, &[], &[], PATIENCE)).await {
            // As in `first_answer`; asking twice changes nothing in the guest.
            Err(AgentError::Refused { .. }) if Instant::now() < deadline => {}
            done => break done.context("ask the witness program in the guest")?,
        }
    };
    serde_json::from_slice(&out.stdout)
        .with_context(|| format!("read the witness program's answer {:?}", out.text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_witness_reports_its_own_share() {
        let text = r#"{"steps":9,"lines":1,"memory_ok":true,"last_gap_ms":2.0,"max_gap_ms":3.0,
            "memory_bytes":8000000,"written_bytes":30000000}"#;
        let w: Witness = serde_json::from_str(text).expect("read");
        let s = Duration::from_secs;
        // 3 MB/s.
        assert_eq!(w.share(s(10), s(2), 2), 14_000_000);
        assert_eq!(w.share(s(10), s(60), 2), 16_000_000, "no page is counted more than twice");
        assert_eq!(w.share(s(10), s(5), 9), 23_000_000);
        assert_eq!(w.share(s(10), s(0), 2), 8_000_000);
    }
}
