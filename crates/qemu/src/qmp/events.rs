//! The log of what QEMU reported, and cursors that read it without losing anything.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

/// Events kept for cursors that have not read them yet.
const KEPT: usize = 4096;

/// Something that QEMU reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`, `RESUME`, `MIGRATION` or `SHUTDOWN`.
    pub name: String,
    /// Its data; null when it has none.
    pub data: Value,
    /// QEMU's own time stamp, since the Unix epoch, in microsecond steps.
    pub at: Duration,
}

impl Event {
    /// The `status` of a `MIGRATION` event.
    #[must_use]
    pub fn migration_status(&self) -> Option<&str> {
        if self.name == "MIGRATION" { self.data["status"].as_str() } else { None }
    }
}

/// Why no event came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// QEMU is gone.
    #[error("QEMU closed its control socket while {0} was waited for")]
    Closed(String),
    /// It did not happen in time.
    #[error("{0} did not come within {1:?}")]
    TimedOut(String, Duration),
    /// The cursor was read too seldom.
    #[error("events were lost before {0} could be looked for")]
    Lagged(String),
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Event>,
    /// Number of the first one kept.
    first: u64,
}

#[derive(Debug)]
pub(crate) struct EventLog {
    kept: Mutex<Kept>,
    /// Number of events so far; dropped with the connection.
    count: watch::Sender<u64>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        let kept = Mutex::new(Kept { events: VecDeque::new(), first: 0 });
        Self { kept, count: watch::Sender::new(0) }
    }

    pub(crate) fn push(&self, event: Event) {
        let count = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.events.push_back(event);
            if kept.events.len() > KEPT {
                kept.events.pop_front();
                kept.first += 1;
            }
            kept.first + kept.events.len() as u64
        };
        self.count.send_replace(count);
    }

    /// No more events will come.
    pub(crate) fn close(&self) {
        self.count.send_replace(u64::MAX);
    }

    /// The newest one kept that `pick` gives something for.
    pub(crate) fn newest<T>(&self, pick: impl FnMut(&Event) -> Option<T>) -> Option<T> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.events.iter().rev().find_map(pick)
    }

    pub(crate) fn cursor(self: &Arc<Self>) -> EventCursor {
        let next = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.first + kept.events.len() as u64
        };
        EventCursor { log: Arc::clone(self), next, changed: self.count.subscribe() }
    }
}

/// Reads events from the moment it was made on. Take it before causing what is waited for.
#[derive(Debug, Clone)]
pub struct EventCursor {
    log: Arc<EventLog>,
    next: u64,
    changed: watch::Receiver<u64>,
}

impl EventCursor {
    /// The next event; `None` when QEMU is gone and all was read.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let closed = *self.changed.borrow_and_update() == u64::MAX;
            {
                let kept = self.log.kept.lock().unwrap_or_else(PoisonError::into_inner);
                self.next = self.next.max(kept.first);
                let at = usize::try_from(self.next - kept.first).unwrap_or(usize::MAX);
                if let Some(event) = kept.events.get(at) {
                    self.next += 1;
                    return Some(event.clone());
                }
            }
            if closed || self.changed.changed().await.is_err() {
                return None;
            }
        }
    }

    /// The next event that `wanted` picks; `what` names it in errors.
    ///
    /// # Errors
    /// [`WaitError`] when QEMU ends or the time runs out first.
    pub async fn wait_for(
        &mut self,
        what: &str,
        within: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event, WaitError> {
        let deadline = Instant::now() + within;
        loop {
            match tokio::time::timeout_at(deadline, self.next()).await {
                Err(_) => return Err(WaitError::TimedOut(what.to_owned(), within)),
                Ok(None) => return Err(WaitError::Closed(what.to_owned())),
                Ok(Some(event)) if wanted(&event) => return Ok(event),
                Ok(Some(_)) => {}
            }
        }
    }

    /// The next event called `name`.
    ///
    /// # Errors
    /// As [`EventCursor::wait_for`].
    pub async fn wait_named(&mut self, name: &str, within: Duration) -> Result<Event, WaitError> {
        self.wait_for(name, within, |e| e.name == name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str) -> Event {
        Event { name: name.into(), data: Value::Null, at: Duration::ZERO }
    }

    #[tokio::test]
    async fn a_cursor_sees_what_came_after_it_was_made_and_then_the_end() {
        let log = Arc::new(EventLog::new());
        log.push(event("EARLIER"));
        let mut cursor = log.cursor();
        log.push(event("STOP"));
        log.push(event("RESUME"));
        assert_eq!(cursor.next().await.unwrap().name, "STOP");
        let resume = cursor.wait_named("RESUME", Duration::from_secs(5)).await.unwrap();
        assert_eq!(resume.name, "RESUME");
        log.close();
        assert_eq!(cursor.next().await, None);
        let late = cursor.wait_named("STOP", Duration::from_secs(5)).await;
        assert_eq!(late, Err(WaitError::Closed("STOP".into())));
    }

    #[tokio::test]
    async fn waiting_ends_with_the_deadline() {
        let log = Arc::new(EventLog::new());
        let within = Duration::from_millis(50);
        let got = log.cursor().wait_named("STOP", within).await;
        assert_eq!(got, Err(WaitError::TimedOut("STOP".into(), within)));
    }

    #[tokio::test]
    async fn a_flood_keeps_memory_bounded() {
        let log = Arc::new(EventLog::new());
        let mut cursor = log.cursor();
        for n in 0..KEPT + 10 {
            log.push(event(&n.to_string()));
        }
        assert_eq!(cursor.next().await.unwrap().name, "10");
    }
}
