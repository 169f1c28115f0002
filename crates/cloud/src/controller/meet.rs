//! Brings the relays of a migration together where the destination's has to dial.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::verbs::{MigrateDial, Request};
use godwit_site::{Asking, Call, Incoming, SiteHost, SiteRequest, verbs};
use godwit_types::Fault;

use super::Moves;
use super::moves::Move;

/// How often the relays are brought together until they have met.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a source may take until it knows of the migration.
const BEGIN_LOOK: Duration = Duration::from_millis(50);

/// Refuses a source of an earlier release, whose relays only dial, for a destination that nobody
/// can reach.
pub(super) fn can_be_dialled(src: &Arc<dyn SiteHost>, to: &Incoming) -> Result<(), Fault> {
    if !to.dials() || src.speaks() >= MigrateDial::SINCE {
        return Ok(());
    }
    Err(Fault::unavailable(format!(
        "site '{}' cannot be reached, and the release of site '{}' does not let itself be dialled",
        to.peer,
        src.name()
    ))
    .hint("update that site"))
}

/// Whether the destination may have to dial. A center that was restarted does not know; the source
/// does.
pub(super) fn may_dial(asking: &Asking<Vec<u8>>) -> bool {
    match asking.request() {
        SiteRequest::MigrateSend(send) => send.to.dials(),
        SiteRequest::MigrateResumeOut(resume) => resume.to.dials(),
        _ => true,
    }
}

impl Moves {
    /// Has the destination's relay dial the source's whenever that waits for it. Ends at once for a
    /// destination that listens, else not before whoever follows the move.
    pub(super) async fn introduce(&self, m: &Move, dials: bool) {
        if !dials {
            return;
        }
        let mut pause = BEGIN_LOOK;
        loop {
            if let (Ok(src), Ok(dst)) = (self.sites.host(&m.from), self.sites.host(&m.to)) {
                if src.speaks().min(dst.speaks()) < MigrateDial::SINCE {
                    return;
                }
                match src.ask(verbs::MigrateListening { migration: m.id }, Call::quiet()).await {
                    // They may lose each other, and this may be said of the attempt before.
                    Ok(None) => pause = AGAIN,
                    Ok(Some(address)) => {
                        pause = AGAIN;
                        godwit_hold::at("meet.dial").await;
                        let dial = MigrateDial { migration: m.id, vm: m.vm.id, address };
                        if let Err(error) = dst.ask(dial, Call::quiet()).await {
                            tracing::info!(site = %m.to, %error, "not told where to dial");
                        }
                    }
                    Err(error) => {
                        tracing::debug!(site = %m.from, %error, "where its relay listens");
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN);
        }
    }
}
