//! Waiting for states that send no event.

use std::time::{Duration, Instant};

/// The pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Looks at a state until it is there.
///
/// # Panics
/// When it is not there `within` the time; `what` says what was waited for.
pub fn within<T>(within: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(t) = look() {
            return t;
        }
        assert!(begun.elapsed() < within, "waited {within:?} for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}
