//! What the tasks of a site work with.

use std::sync::Arc;

use godwit_types::Name;

use super::SiteDirs;
use super::images::Images;
use super::launch::Launcher;
use super::meet::Reach;
use super::net::SiteNetworks;
use super::record::MachineRecord;
use super::relays::Relays;
use super::room::Room;
use super::substrates::Substrates;
use super::table::Machines;
use super::warrant::Warrants;

/// The parts of one site, which all who do something there share.
pub(super) struct Parts {
    pub(super) name: Name,
    pub(super) dirs: SiteDirs,
    pub(super) images: Arc<Images>,
    pub(super) launcher: Launcher,
    pub(super) networks: Arc<SiteNetworks>,
    pub(super) machines: Machines,
    pub(super) room: Room,
    pub(super) substrates: Substrates,
    pub(super) relays: Relays,
    pub(super) reach: Reach,
    pub(super) warrants: Warrants,
}

impl Parts {
    /// What both sites of a move hold of its machine was found to differ: what is here of substrate and
    /// image is read again before it is used next, and nothing is kept of the machine's visits.
    pub(super) fn doubt(&self, record: &MachineRecord) {
        let visits = &self.machines.visits;
        for id in record.substrate.into_iter().chain(visits.under(record.vm)) {
            self.substrates.pool.doubt_memory(id);
        }
        self.images.doubt(record);
        visits.forget(record.vm);
    }
}
