//! Where the relays of a migration meet, when the destination's cannot be reached from outside.
//!
//! ```text
//! center -> destination: prepare      answered without an address: it has to dial
//! center -> source: send              its relay listens in place of dialling
//! center -> source: listening         where
//! center -> destination: dial         its relay opens the link; the migration goes on as ever
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use godwit_migrate::RelayClient;
use godwit_migrate::relay::Meeting;
use godwit_types::{Fault, Name};

use super::faults::into_fault;
use crate::Incoming;

/// In place of an address: nobody can reach the destination's relay.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

impl Incoming {
    /// Whether the destination's relay has to dial the source's, since nobody can reach it.
    #[must_use]
    pub const fn dials(&self) -> bool {
        self.address.port() == 0
    }
}

/// Whether and where other sites reach this one's relays.
pub(super) struct Reach {
    site: Name,
    address: IpAddr,
    behind_nat: bool,
}

impl Reach {
    /// As the site is run.
    pub(super) const fn new(site: Name, address: IpAddr, behind_nat: bool) -> Self {
        Self { site, address, behind_nat }
    }

    /// How this site's relay awaits the other one.
    pub(super) fn awaits(&self) -> Meeting {
        Meeting::Listen((self.address, 0).into())
    }

    /// How a source's relay meets that of a machine's destination.
    pub(super) fn meets(&self, to: &Incoming) -> Result<Meeting, Fault> {
        match (to.dials(), self.behind_nat) {
            (false, _) => Ok(Meeting::Dial(to.address)),
            (true, false) => Ok(self.awaits()),
            (true, true) => Err(Fault::conflict(format!(
                "neither site '{}' nor site '{}' can be reached by the other",
                self.site, to.peer
            ))
            .hint("move by way of a site that both reach, such as the center's")),
        }
    }

    /// What the source is told of where this site's relay listens.
    pub(super) async fn reported_address(&self, relay: &RelayClient) -> Result<SocketAddr, Fault> {
        let status = relay.wait(|s| s.listening.is_some()).await.map_err(into_fault)?;
        let address = status
            .listening
            .ok_or_else(|| Fault::internal(format!("the relay ended: {:?}", status.end)))?;
        Ok(if self.behind_nat { NOWHERE } else { address })
    }
}
