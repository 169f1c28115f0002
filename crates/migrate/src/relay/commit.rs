//! Where a destination's relay writes down that the machine is to run here, before anybody is told.
//!
//! ```text
//! QEMU: PONG 3 -> relay: '1' over '0', fdatasync -> status, and PONG 3 to the source
//! ```
//!
//! A host that dies before that has not taken the machine, and one that dies after it has: the
//! source is told so by whoever reads the file, and never learns of a commit that nothing here knows
//! of. One byte is overwritten and none is added, so that a full disk is no reason to fail.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;

use super::RelayError;

/// What the file says before the commit point, and from it on.
const NOT_YET: u8 = b'0';
const RUNS: u8 = b'1';

/// What such a file says that no relay has written to.
pub const NOT_COMMITTED: &[u8] = b"0\n";

/// Whether a file that says this tells of the commit point.
#[must_use]
pub fn says_committed(bytes: &[u8]) -> bool {
    bytes.first() == Some(&RUNS)
}

/// The file, when the relay was given one.
#[derive(Debug, Default)]
pub(super) struct CommitFile(Option<Arc<Mutex<File>>>);

impl CommitFile {
    pub(super) fn new(file: Option<File>) -> Self {
        Self(file.map(|f| Arc::new(Mutex::new(f))))
    }

    /// Writes down that the machine is to run here; on disk when this returns. Once more is as
    /// once.
    pub(super) async fn write(&self) -> Result<(), RelayError> {
        let Some(file) = &self.0 else { return Ok(()) };
        let began = Instant::now();
        let file = Arc::clone(file).lock_owned().await;
        let written = tokio::task::spawn_blocking(move || {
            put(&file, RUNS).inspect_err(|_| {
                // It may say either now, and the daemon goes by the status.
                let _ = put(&file, NOT_YET);
            })
        });
        written
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(RelayError::NotWritten)?;
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(micros, "it is written down that the machine runs here");
        Ok(())
    }

    /// Waits until no write is under way: what was given up has then been written, or never will
    /// be.
    pub(super) async fn settle(&self) {
        if let Some(file) = &self.0 {
            let _ = file.lock().await;
        }
    }
}

fn put(file: &File, word: u8) -> std::io::Result<()> {
    file.write_all_at(&[word], 0)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_word_is_in_the_file_when_it_is_passed_on() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("ran");
        std::fs::write(&path, NOT_COMMITTED).expect("made");
        let read = || std::fs::read(&path).expect("there");
        let file = File::options().write(true).open(&path).expect("opened");
        let commit = CommitFile::new(Some(file));
        assert!(!says_committed(&read()) && !says_committed(b""));
        for _ in 0..2 {
            commit.write().await.expect("written");
            assert!(says_committed(&read()));
            assert_eq!(read().len(), NOT_COMMITTED.len(), "no more room is needed");
        }
        commit.settle().await;
        CommitFile::new(None).write().await.expect("a relay without one is as it was");
    }

    #[tokio::test]
    async fn a_word_that_cannot_be_written_is_an_error() {
        let full = File::options().write(true).open("/dev/full").expect("opened");
        let e = CommitFile::new(Some(full)).write().await.expect_err("full");
        assert!(e.in_full().contains("No space left"), "{}", e.in_full());
    }
}
