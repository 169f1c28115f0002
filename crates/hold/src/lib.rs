//! Named steps at which a test build can be held, so that a test kills, cuts or fills exactly
//! there, in place of trying until it hits.
//!
//! `GODWIT_HOLD` names a directory. A program that comes to step `S` while the file `S` is there
//! writes its process id to `S.held` and goes on once `S` is gone. Steps are named
//! `room.step`, as `dock.stopped`. Nothing of this is in a build without debug assertions: what is
//! released can't be held.
//!
//! ```text
//! test:    create S ............ S.held is there: kill -9, or remove S
//! program: ........ comes to S, writes S.held, waits .................. removes S.held, goes on
//! ```
//!
//! Where `S` says [`PANIC`] whoever comes to it panics in place of waiting, once.

use std::path::PathBuf;
use std::time::Duration;

/// The directory that holds the requests to wait.
pub const VARIABLE: &str = "GODWIT_HOLD";

/// What a request says that is to end by a panic whoever comes to its step.
pub const PANIC: &str = "panic";

const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The request to hold at `step` and the answer that somebody is held there.
struct Step {
    request: PathBuf,
    held: PathBuf,
}

impl Step {
    fn requested(step: &str) -> Option<Self> {
        if !cfg!(debug_assertions) {
            return None;
        }
        let dir = PathBuf::from(std::env::var_os(VARIABLE)?);
        let found = Self { request: dir.join(step), held: dir.join(format!("{step}.held")) };
        if !found.request.exists() {
            return None;
        }
        if std::fs::read_to_string(&found.request).is_ok_and(|says| says == PANIC) {
            let _ = std::fs::remove_file(&found.request);
            panic!("at '{step}', as a test asked for");
        }
        // A request that cannot be answered makes its test fail by its own time-out.
        let part = dir.join(format!("{step}.part"));
        let _ = std::fs::write(&part, std::process::id().to_string());
        let _ = std::fs::rename(&part, &found.held);
        Some(found)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.held);
    }
}

/// Waits here for as long as a test wants it.
pub async fn at(step: &'static str) {
    let Some(step) = Step::requested(step) else { return };
    while step.request.exists() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// As [`at`], where code blocks.
pub fn at_blocking(step: &'static str) {
    let Some(step) = Step::requested(step) else { return };
    while step.request.exists() {
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_held_while_its_file_is_there() {
        let dir = tempfile::tempdir().unwrap();
        // SAFETY: nextest runs each test in a process of its own, and this one has no other thread yet.
        unsafe { std::env::set_var(VARIABLE, dir.path()) };
        at_blocking("test.other");
        std::fs::write(dir.path().join("test.step"), "").unwrap();
        let held = dir.path().join("test.step.held");
        let program = std::thread::spawn(|| at_blocking("test.step"));
        while std::fs::read_to_string(&held).ok() != Some(std::process::id().to_string()) {
            assert!(!program.is_finished());
            std::thread::yield_now();
        }
        std::fs::remove_file(dir.path().join("test.step")).unwrap();
        program.join().unwrap();
        assert!(!held.exists());
        std::fs::write(dir.path().join("test.step"), PANIC).unwrap();
        std::thread::spawn(|| at_blocking("test.step")).join().unwrap_err();
        at_blocking("test.step");
    }
}
