//! Where the relays of a migration meet, when the destination's cannot be reached from outside.
//!
//! ```text
//! center -> destination: prepare      answered without an address: it has to dial
//! center -> source: send              its relay listens in place of dialling
//! center -> source: listening         where
//! center -> destination: dial         its relay opens the link; the migration goes on as ever
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use godwit_migrate::RelayClient;
use godwit_migrate::relay::{Meeting, RelayCommand};
use godwit_types::{Fault, MigrationId, VmId};

use super::LocalSite;
use super::machines::into_fault;
use super::record::End;
use super::relays::MovePaths;
use crate::Incoming;

/// How long a source's relay may take until it listens.
const LISTEN_WITHIN: Duration = Duration::from_secs(20);

/// In place of an address: nobody can reach the destination's relay.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

impl Incoming {
    /// Whether the destination's relay has to dial the source's, since nobody can reach it.
    #[must_use]
    pub const fn dials(&self) -> bool {
        self.address.port() == 0
    }
}

impl LocalSite {
    /// How this site's relay awaits the other one.
    pub(super) fn awaits(&self) -> Meeting {
        Meeting::Listen((self.options.relay_address, 0).into())
    }

    /// How a source's relay meets that of a machine's destination.
    pub(super) fn meets(&self, to: &Incoming) -> Result<Meeting, Fault> {
        match (to.dials(), self.options.behind_nat) {
            (false, _) => Ok(Meeting::Dial(to.address)),
            (true, false) => Ok(self.awaits()),
            (true, true) => Err(Fault::conflict(format!(
                "neither site '{}' nor site '{}' can be reached by the other",
                self.name, to.peer
            ))
            .hint("move by way of a site that both reach, such as the center's")),
        }
    }

    /// What the source is told of where this site's relay listens.
    pub(super) async fn told_address(&self, relay: &RelayClient) -> Result<SocketAddr, Fault> {
        let status = relay.wait(|s| s.listening.is_some()).await.map_err(into_fault)?;
        let address = status
            .listening
            .ok_or_else(|| Fault::internal(format!("the relay ended: {:?}", status.end)))?;
        Ok(if self.options.behind_nat { NOWHERE } else { address })
    }

    /// Where the relay of a machine that leaves listens; `None` once it has met the destination's.
    pub(super) async fn listening(&self, id: MigrationId) -> Result<Option<SocketAddr>, Fault> {
        let moving = self.moving(id).ok_or_else(|| self.no_such_move(id))?;
        if moving.outcome.borrow().is_some() {
            // That of the attempt before; the next is about to begin.
            return Err(Fault::unavailable("the source's relay has ended"));
        }
        let found = async {
            let mut shown = moving.shown.subscribe();
            let mut relay = shown.wait_for(Option::is_some).await.ok()?.clone()?;
            let now = relay.wait_for(|s| s.listening.is_some() || s.met || s.end.is_some()).await;
            Some(now.ok()?.clone())
        };
        match tokio::time::timeout(LISTEN_WITHIN, found).await {
            Ok(Some(now)) if now.met => Ok(None),
            Ok(Some(now)) if now.end.is_none() => Ok(now.listening),
            _ => Err(Fault::unavailable("the source's relay does not listen")),
        }
    }

    /// Has the relay of a machine that arrives dial that of its source.
    pub(super) async fn dial(
        &self,
        id: MigrationId,
        vm: VmId,
        address: SocketAddr,
    ) -> Result<(), Fault> {
        let record = self.machines.entry(vm).await?.lock().await.record.clone();
        let migration = record.migration.as_ref();
        let migration = migration
            .filter(|m| m.id == id && m.end == End::Destination)
            .ok_or_else(|| self.no_such_move(id))?;
        let paths = MovePaths::of(&self.dirs.run, migration);
        let relay = RelayClient::attach(&paths.control).await.map_err(into_fault)?;
        if relay.command(&RelayCommand::Dial { address }).await.map_err(into_fault)? {
            return Ok(());
        }
        Err(Fault::conflict("its relay has met the source's already, or has ended"))
    }
}
