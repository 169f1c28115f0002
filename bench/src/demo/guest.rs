//! What the demo looks at in a guest: its screen, its witness, its heartbeat, its identity.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::glyph::DESKTOP_COLOURS;
use super::world::World;
use crate::suites::mainjob::godwit::GodwitCli;
use crate::suites::{self, SIGNS};

const LIB: &str = "/usr/lib/godwit";
/// Pixels that may differ on a screen at rest: a blinking caret.
const CARET_PIXELS: usize = 200;
/// A screen that stays the same for this long is at rest.
const REST: Duration = Duration::from_secs(4);
/// Time between two looks at a screen.
const LOOK: Duration = Duration::from_millis(200);

/// A picture of a screen.
pub(super) struct Screen {
    png: Vec<u8>,
    width: usize,
    pixels: Vec<[u8; 3]>,
}

impl Screen {
    pub(super) async fn take(world: &World, vm: &str) -> anyhow::Result<Self> {
        let png = world
            .cli()
            .run(&["vm", "screenshot", vm, "-"], Duration::from_secs(60))
            .await
            .with_context(|| format!("take a picture of {vm}"))?;
        Self::decode(png)
    }

    fn decode(png: Vec<u8>) -> anyhow::Result<Self> {
        let mut decoder = png::Decoder::new(std::io::Cursor::new(&png));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().context("read a picture")?;
        let size = reader.output_buffer_size().context("a picture too large")?;
        let mut raw = vec![0; size];
        let info = reader.next_frame(&mut raw).context("decode a picture")?;
        let samples = info.color_type.samples();
        ensure!(samples >= 3, "a picture without colours");
        let pixels =
            raw[..info.buffer_size()].chunks_exact(samples).map(|p| [p[0], p[1], p[2]]).collect();
        Ok(Self { width: info.width as usize, pixels, png })
    }

    /// Pixels in which two screens differ.
    fn differ(&self, other: &Self) -> usize {
        if self.width != other.width || self.pixels.len() != other.pixels.len() {
            return self.pixels.len().max(other.pixels.len());
        }
        self.pixels.iter().zip(&other.pixels).filter(|(a, b)| a != b).count()
    }

    fn drawn(&self) -> bool {
        let mut colours = std::collections::HashSet::new();
        self.pixels.iter().any(|p| colours.insert(*p) && colours.len() >= DESKTOP_COLOURS)
    }

    /// Waits until a drawn screen has come to rest; the picture is of the moment it did.
    pub(super) async fn settled(world: &World, vm: &str, within: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + within;
        let mut kept = Self::take(world, vm).await?;
        let mut since = Instant::now();
        loop {
            let now = Self::take(world, vm).await?;
            if !now.drawn() || now.differ(&kept) > CARET_PIXELS {
                (kept, since) = (now, Instant::now());
            } else if since.elapsed() >= REST {
                return Ok(kept);
            }
            ensure!(
                Instant::now() < deadline,
                "the screen of {vm} did not come to rest within {within:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until the screen is another than this one.
    pub(super) async fn changed(
        &self,
        world: &World,
        vm: &str,
        within: Duration,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        while Self::take(world, vm).await?.differ(self) == 0 {
            ensure!(
                Instant::now() < deadline,
                "the screen of {vm} did not change within {within:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Whether both show the same, a caret left aside.
    pub(super) fn same_text(&self, other: &Self) -> bool {
        self.differ(other) <= CARET_PIXELS
    }

    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, &self.png).with_context(|| format!("write {}", path.display()))
    }
}

/// The program in the guest that keeps a pattern in memory and lines in a file.
pub(super) struct Witness {
    file: String,
    memory_mib: u32,
}

#[derive(Debug, Deserialize)]
struct Check {
    lines: u64,
    ok: bool,
}

impl Witness {
    pub(super) async fn start(world: &World, vm: &str, memory_mib: u32) -> anyhow::Result<Self> {
        let dir = world
            .exec(
                vm,
                &["/bin/sh", "-c", "if [ -d /data ]; then echo /data; else echo /var/tmp; fi"],
            )
            .await?;
        let me = Self { file: format!("{}/witness.lines", dir.trim()), memory_mib };
        me.run(world, vm).await?;
        Ok(me)
    }

    async fn run(&self, world: &World, vm: &str) -> anyhow::Result<()> {
        let script = format!(
            "{SIGNS}; {LIB}/user-run {LIB}/godwit-witness run --memory-mib {} --file {} \
             --signs $tty >/dev/null 2>&1; \
             n=0; until {LIB}/godwit-witness status 2>/dev/null | grep -q '\"lines\":[1-9]'; do \
             n=$((n+1)); [ $n -lt 300 ] || exit 9; sleep 0.2; done",
            self.memory_mib, self.file
        );
        world.exec(vm, &["/bin/sh", "-c", &script]).await.context("start the witness").map(drop)
    }

    async fn status(&self, world: &World, vm: &str) -> anyhow::Result<suites::Witness> {
        let text = world.exec(vm, &[suites::WITNESS, "status"]).await?;
        serde_json::from_str(&text).with_context(|| format!("read the witness's {text:?}"))
    }

    /// Begins to count what it writes.
    pub(super) async fn reset(&self, world: &World, vm: &str) -> anyhow::Result<()> {
        world.exec(vm, &[suites::WITNESS, "status", "--reset"]).await.map(drop)
    }

    /// What it says of itself, once it is known to be whole.
    pub(super) async fn healthy(&self, world: &World, vm: &str) -> anyhow::Result<suites::Witness> {
        let s = self.status(world, vm).await?;
        ensure!(s.memory_ok, "the memory pattern is damaged after {} steps", s.steps);
        Ok(s)
    }

    /// Whether memory is whole, and how many lines of the file are, each compared.
    pub(super) async fn check(&self, world: &World, vm: &str) -> anyhow::Result<(bool, u64)> {
        // The page cache is dropped first, so that the lines come from the disk.
        let script = format!(
            "sync; echo 3 > /proc/sys/vm/drop_caches; {LIB}/godwit-witness check --file {}",
            self.file
        );
        let text = world.exec(vm, &["/bin/sh", "-c", &script]).await?;
        let c: Check = serde_json::from_str(&text).with_context(|| format!("read {text:?}"))?;
        ensure!(c.ok, "the file is damaged after line {}", c.lines);
        let s = self.status(world, vm).await?;
        ensure!(
            s.lines >= c.lines.saturating_sub(1),
            "lines are missing: {} of {}",
            c.lines,
            s.lines
        );
        Ok((s.memory_ok, c.lines))
    }

    /// Whether it goes on working.
    pub(super) async fn grows(&self, world: &World, vm: &str) -> anyhow::Result<bool> {
        let first = self.status(world, vm).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let now = self.status(world, vm).await?;
            if now.lines > first.lines && now.steps > first.steps {
                return Ok(now.memory_ok);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }
}

/// The console logs that the machine `vm` has at both sites.
pub(crate) async fn consoles(
    cli: &GodwitCli,
    runs: &[PathBuf],
    vm: &str,
) -> anyhow::Result<Vec<PathBuf>> {
    let all: Value = cli.ask(&["vm", "get", vm], Duration::from_secs(30)).await?;
    let id = all["id"].as_str().or_else(|| all["vm"]["id"].as_str()).context("the machine's id")?;
    let dir = id.replace('-', "");
    Ok(runs.iter().map(|run| run.join(&dir).join("console.log")).collect())
}

/// Who a guest is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GuestIdentity {
    pub(super) hostname: String,
    pub(super) machine_id: String,
    pub(super) mac: String,
    pub(super) random: String,
}

pub(super) async fn identity(world: &World, vm: &str) -> anyhow::Result<GuestIdentity> {
    let text = world.exec(vm, &[&format!("{LIB}/identity")]).await?;
    serde_json::from_str(&text).with_context(|| format!("read the identity of {vm}: {text:?}"))
}

/// Whether no two share a host name, machine id, MAC address or random number.
pub(super) fn all_distinct(all: &[GuestIdentity]) -> bool {
    let fields: [fn(&GuestIdentity) -> &str; 4] =
        [|i| &i.hostname, |i| &i.machine_id, |i| &i.mac, |i| &i.random];
    fields.iter().all(|f| {
        let set: std::collections::HashSet<&str> = all.iter().map(f).collect();
        set.len() == all.len() && !set.contains("")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shared_field_is_enough_to_be_found() {
        let one = GuestIdentity {
            hostname: "a".into(),
            machine_id: "1".into(),
            mac: "m".into(),
            random: "r".into(),
        };
        let two = GuestIdentity {
            hostname: "b".into(),
            machine_id: "2".into(),
            mac: "n".into(),
            random: "s".into(),
        };
        assert!(all_distinct(&[one.clone(), two.clone()]));
        assert!(!all_distinct(&[one.clone(), GuestIdentity { mac: "m".into(), ..two }]));
    }
}
