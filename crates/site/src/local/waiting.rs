//! QEMUs that wait for the substrates that are activated often.
//!
//! ```text
//! activation of a substrate --> one waits for it from now on --> the next activation takes it
//!        (the oldest substrate's is ended when too many wait)       and another one is started
//! ```

use godwit_image::Image;
use godwit_qemu::{Accel, Machine};
use godwit_types::SubstrateId;

use super::dirs::WAITING;
use super::substrates::Substrates;
use super::{LocalSite, SiteDirs};

/// The most substrates that QEMUs wait for; each of them holds some 40 MiB.
const MOST_LINES: usize = 4;

/// Ends the QEMUs that waited for a daemon that is gone.
pub(super) async fn sweep(dirs: &SiteDirs) {
    for item in std::fs::read_dir(&dirs.run).into_iter().flatten().flatten() {
        if !item.file_name().to_string_lossy().starts_with(WAITING) {
            continue;
        }
        if let Ok(machine) = Machine::adopt(&item.path()).await {
            machine.kill().await;
        }
        if let Err(e) = std::fs::remove_dir_all(item.path()) {
            tracing::warn!(path = %item.path().display(), error = %e, "not removed");
        }
    }
    for item in std::fs::read_dir(dirs.waiting()).into_iter().flatten().flatten() {
        if let Err(e) = std::fs::remove_dir_all(item.path()) {
            tracing::warn!(path = %item.path().display(), error = %e, "not removed");
        }
    }
}

impl Substrates {
    /// Lets QEMUs wait for a substrate that was just activated, in the background.
    pub(super) fn keep_waiting(&self, id: SubstrateId, image: Image, accel: Accel) {
        let (shells, wanted, pool) = (self.shells.clone(), self.wanted, self.pool.clone());
        if wanted == 0 {
            return;
        }
        tokio::spawn(async move {
            // Ids grow with time: the smallest is the oldest substrate.
            let mut others = shells.kept();
            others.retain(|kept| *kept != id);
            others.sort_unstable();
            let too_many = (others.len() + 1).saturating_sub(MOST_LINES);
            for (n, old) in others.iter().enumerate() {
                // What waits keeps memory in use that may be wanted for what runs.
                if n >= too_many && pool.over_budget() == 0 {
                    break;
                }
                shells.drop_line(*old).await;
                let _ = pool.start(|pool| pool.reclaim(pool.over_budget())).await;
            }
            if let Err(error) = shells.keep(id, image, accel, wanted).await {
                tracing::warn!(%id, %error, "no QEMU waits for a substrate");
            }
        });
    }

    /// QEMUs that wait.
    pub(super) fn waiting(&self) -> u64 {
        self.shells.kept().into_iter().map(|id| self.shells.waiting(id) as u64).sum()
    }
}

impl LocalSite {
    /// Ends what must not outlive the daemon: the QEMUs that wait. Machines run on.
    pub async fn close(&self) {
        self.parts.substrates.shells.close().await;
        if let Some(groups) = &self.parts.launcher.groups {
            groups.sweep();
        }
        let service = self.sched.lock().ok().and_then(|mut s| s.take());
        // Its thread puts everything back before it ends.
        let _ = tokio::task::spawn_blocking(move || drop(service)).await;
    }
}
