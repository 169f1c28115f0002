//! A guest's signs of life, seen from outside.
//!
//! A guest's own clock stands still while its vCPUs do, so nothing in the guest can tell how long
//! somebody outside waited. The witness shows signs on its serial console instead: a `.` every 20 ms
//! by a thread that does nothing else, a `+` whenever its working program has gone on. A prober on
//! the host reads the consoles of both places that a moving machine has, and stamps what comes with
//! the host's monotonic clock: one series, from before the request until after the end.
//!
//! There is no network to ping the guest over. A *ping* here is a moment, ten a second; it is
//! answered by the guest's next sign of life, and lost when none comes before the next ping.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

/// Time between two looks at the consoles.
const LOOK: Duration = Duration::from_millis(1);
/// Time between two pings.
pub const PING_EVERY: Duration = Duration::from_millis(100);
/// A guest that shows nothing for this long at the beginning does not run the witness.
const FIRST_SIGN: Duration = Duration::from_secs(30);
/// How long signs are watched for after the end of what is measured.
const AFTER: Duration = Duration::from_millis(500);

/// The sign of the thread that only beats.
const BEAT: u8 = b'.';
/// The sign of the program that works.
const WORK: u8 = b'+';

/// What somebody outside saw of a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Signs {
    /// Longest time without a sign of life in ms, whatever its cause: downtime, or a guest that
    /// waits for its memory.
    pub longest_stall_ms: f64,
    /// Longest time in ms for which the program that changes memory and appends to its file did not
    /// go on.
    pub program_stall_ms: f64,
    /// Pings, ten a second.
    pub pings: u64,
    /// Of those, pings without an answer before the next.
    pub pings_lost: u64,
    /// How long was watched, in ms.
    pub watched_ms: f64,
}

impl Signs {
    /// From the times of both kinds of sign, each in order, since the beginning of a watch of
    /// length `watched`.
    #[must_use]
    pub fn of(beats: &[Duration], work: &[Duration], watched: Duration) -> Self {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let (pings, pings_lost) = pings(beats, watched);
        Self {
            longest_stall_ms: ms(longest_gap(beats, watched)),
            program_stall_ms: ms(longest_gap(work, watched)),
            pings,
            pings_lost,
            watched_ms: ms(watched),
        }
    }
}

/// The longest time between two of `times`, the beginning and the end of the watch included.
fn longest_gap(times: &[Duration], watched: Duration) -> Duration {
    let ends = times.iter().copied().chain([watched]);
    let starts = [Duration::ZERO].into_iter().chain(times.iter().copied());
    ends.zip(starts).map(|(end, start)| end.saturating_sub(start)).max().unwrap_or_default()
}

/// How many pings there were, and how many of them nothing answered.
fn pings(beats: &[Duration], watched: Duration) -> (u64, u64) {
    let whole = watched.as_nanos() / PING_EVERY.as_nanos();
    let (mut next, mut lost, mut sent) = (beats.iter().peekable(), 0, 0);
    let mut from = Duration::ZERO;
    for _ in 0..whole {
        let to = from + PING_EVERY;
        let mut answered = false;
        while next.next_if(|at| **at < to).is_some() {
            answered = true;
        }
        sent += 1;
        lost += u64::from(!answered);
        from = to;
    }
    (sent, lost)
}

/// What of one console has been read.
#[derive(Debug)]
struct Console {
    path: PathBuf,
    file: u64,
    read: u64,
}

impl Console {
    /// Begins behind what is there already.
    fn at_its_end(path: PathBuf) -> Self {
        let (file, read) = std::fs::metadata(&path).map_or((0, 0), |m| (m.ino(), m.len()));
        Self { path, file, read }
    }

    /// Appends what has come since the last look. The log may be cut short, replaced, or not there.
    fn look(&mut self, new: &mut Vec<u8>) {
        let Ok(m) = std::fs::metadata(&self.path) else { return };
        if m.ino() != self.file || m.len() < self.read {
            (self.file, self.read) = (m.ino(), 0);
        }
        if m.len() == self.read {
            return;
        }
        let Ok(mut log) = File::open(&self.path) else { return };
        if log.seek(SeekFrom::Start(self.read)).is_ok()
            && let Ok(n) = log.take(m.len() - self.read).read_to_end(new)
        {
            self.read += n as u64;
        }
    }
}

/// Watches a guest's consoles on a thread of its own.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    watcher: std::thread::JoinHandle<Signs>,
}

impl Prober {
    /// Begins to watch the console logs `logs`, those of the places where the machine is or will be.
    /// Returns when the guest has shown a sign of life.
    ///
    /// # Errors
    /// When it shows none.
    pub async fn start(logs: &[&Path]) -> anyhow::Result<Self> {
        let mut consoles: Vec<Console> =
            logs.iter().map(|p| Console::at_its_end((*p).to_owned())).collect();
        let deadline = Instant::now() + FIRST_SIGN;
        let mut new = Vec::new();
        while !new.contains(&BEAT) {
            ensure!(
                Instant::now() < deadline,
                "the guest showed no sign of life on its console within {FIRST_SIGN:?}"
            );
            tokio::time::sleep(LOOK).await;
            consoles.iter_mut().for_each(|c| c.look(&mut new));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watcher = std::thread::Builder::new()
            .name("prober".into())
            .spawn(move || watch(consoles, &stopped))
            .context("start the prober")?;
        Ok(Self { stop, watcher })
    }

    /// Watches for another half second, and ends.
    ///
    /// # Errors
    /// When the watching itself failed.
    pub async fn stop(self) -> anyhow::Result<Signs> {
        tokio::time::sleep(AFTER).await;
        self.stop.store(true, Ordering::Relaxed);
        self.watcher.join().map_err(|_| anyhow::anyhow!("the prober failed"))
    }
}

fn watch(mut consoles: Vec<Console>, stop: &AtomicBool) -> Signs {
    let began = Instant::now();
    let (mut beats, mut work, mut new) = (Vec::new(), Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        new.clear();
        consoles.iter_mut().for_each(|c| c.look(&mut new));
        let at = began.elapsed();
        if new.contains(&BEAT) {
            beats.push(at);
        }
        if new.contains(&WORK) {
            work.push(at);
        }
        std::thread::sleep(LOOK);
    }
    Signs::of(&beats, &work, began.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(of: &[u64]) -> Vec<Duration> {
        of.iter().map(|t| Duration::from_millis(*t)).collect()
    }

    #[test]
    fn a_stall_is_the_longest_gap_and_both_ends_count() {
        let watched = Duration::from_millis(1000);
        let all: Vec<u64> = (0..50).map(|n| n * 20).collect();
        let steady = Signs::of(&ms(&all), &ms(&all), watched);
        assert_eq!((steady.longest_stall_ms, steady.pings, steady.pings_lost), (20.0, 10, 0));

        let gap: Vec<u64> = all.iter().copied().filter(|t| !(201..700).contains(t)).collect();
        let s = Signs::of(&ms(&gap), &ms(&all), watched);
        assert_eq!((s.longest_stall_ms, s.program_stall_ms), (500.0, 20.0));
        // The pings at 300, 400, 500 and 600; that at 200 was answered at once.
        assert_eq!(s.pings_lost, 4);

        let cut: Vec<u64> = all.iter().copied().filter(|t| (300..500).contains(t)).collect();
        assert_eq!(Signs::of(&ms(&cut), &[], watched).longest_stall_ms, 520.0, "to the end");
        let s = Signs::of(&[], &[], watched);
        assert_eq!((s.longest_stall_ms, s.pings_lost), (1000.0, 10));
        assert_eq!(Signs::of(&[], &[], Duration::ZERO), Signs::default());
    }

    #[test]
    fn a_log_that_is_cut_or_replaced_is_read_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("console.log");
        let mut new = Vec::new();
        let mut missing = Console::at_its_end(path.clone());
        missing.look(&mut new);
        std::fs::write(&path, b"boot..").expect("written");
        missing.look(&mut new);
        assert_eq!(new, b"boot..");
        let mut c = Console::at_its_end(path.clone());
        new.clear();
        c.look(&mut new);
        assert!(new.is_empty());
        std::fs::write(&path, b"boot..++").expect("written");
        c.look(&mut new);
        assert_eq!(new, b"++");
        // Cut short, as a site does with a long one.
        std::fs::write(&path, b"+").expect("written");
        c.look(&mut new);
        assert_eq!(new, b"+++");
        std::fs::write(dir.path().join("other"), b"......").expect("written");
        std::fs::rename(dir.path().join("other"), &path).expect("renamed");
        c.look(&mut new);
        assert_eq!(new, b"+++......");
    }
}
