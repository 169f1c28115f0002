//! How far a move is, by what its relay and its QEMU say.

use std::time::Duration;

use godwit_migrate::relay::{RelayPhase, RelayStatus};
use godwit_qemu::{Life, Machine};
use tokio::sync::watch;

use crate::{Call, News, Progress};

/// How long QEMU may take to say how it is.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How often progress is reported.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Whether a machine runs. One that does not answer, because it waits for a page, runs if it has
/// told of it.
pub(super) async fn runs(machine: Option<&Machine>) -> bool {
    let Some(m) = machine else { return false };
    match tokio::time::timeout(ANSWER_WITHIN, m.life()).await {
        Ok(Ok(life)) => life == Life::Running,
        Ok(Err(_)) | Err(_) => m.last_resumed(),
    }
}

/// Reports the progress of a migration as its relay counts it.
pub(super) async fn report_progress(
    mut status: watch::Receiver<RelayStatus>,
    call: Call,
    switched: News,
) {
    let mut committed = false;
    loop {
        let s = status.borrow_and_update().clone();
        for p in progress(&s) {
            call.progress(p);
        }
        if !committed && s.committed {
            committed = true;
            call.news(switched.clone());
        }
        if s.end.is_some() || status.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(TELL_EVERY).await;
    }
}

fn progress(s: &RelayStatus) -> Vec<Progress> {
    let c = &s.counts;
    let part = |stage: &str, all: u64, left: u64, sent: u64| Progress {
        stage: stage.into(),
        done: all.saturating_sub(left) * 4096,
        total: all * 4096,
        unit: "bytes".into(),
        note: format!("sent {}", godwit_types::human_bytes(sent)),
    };
    let memory = (s.phase >= RelayPhase::PreCopy)
        .then(|| part("memory", c.round_pages, c.round_left, c.bytes.memory));
    let disk = (c.disk_blocks > 0).then(|| part("disk", c.disk_blocks, c.disk_left, c.bytes.disk));
    memory.into_iter().chain(disk).collect()
}
