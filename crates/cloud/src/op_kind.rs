//! The kinds of operations, as journals keep them.

use godwit_types::{Generation, Name, SubstrateId, SubstrateKind, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an operation does, with what is needed to resume it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum OpKind {
    /// Builds a guest image at a site.
    ImageBuild {
        /// Where.
        site: Name,
        /// Which.
        image: Name,
    },
    /// Cold-boots an environment from an image.
    VmCreate {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
    },
    /// Activates an environment from a substrate.
    VmActivate {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
        /// From what.
        substrate: SubstrateId,
    },
    /// Starts a stopped environment.
    VmStart {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
    },
    /// Stops an environment.
    VmStop {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
    },
    /// Deletes an environment with its disk.
    VmDelete {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
    },
    /// Turns an environment into a substrate.
    VmDock {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
        /// The substrate it becomes.
        substrate: SubstrateId,
        /// The name that the substrate gets; the site's name for it when not told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        called: Option<Name>,
        /// Who may use the substrate; not told by a version before this.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        becomes: Option<SubstrateKind>,
        /// The user of its tenant whose the substrate is; whoever asked, when not told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<Name>,
    },
    /// Moves a running environment.
    VmMigrate {
        /// The environment.
        vm: VmId,
        /// Its name.
        name: Name,
        /// The site it leaves.
        from: Name,
        /// The site it goes to.
        to: Name,
        /// Its generation there.
        generation: Generation,
        /// It died where it had moved to, and is brought back from there, or given up at its source.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        back: bool,
    },
    /// Brings a substrate to a site that lacks it.
    SubstrateCopy {
        /// Which.
        substrate: SubstrateId,
        /// Its name.
        name: Name,
        /// The site it is read from.
        from: Name,
        /// The site that gets it.
        to: Name,
    },
    /// Boots a substrate's stored disk and docks it again in its place.
    SubstrateRebuild {
        /// The machine that it is booted as.
        vm: VmId,
        /// The substrate's name.
        name: Name,
        /// The substrate as it was.
        old: SubstrateId,
        /// The substrate that takes its place.
        new: SubstrateId,
    },
    /// Reads every stored page and block of a pool and compares it with its hash.
    PoolCheck {
        /// Whose pool.
        site: Name,
    },
}

impl OpKind {
    /// Short name, as `op list` shows it.
    #[must_use]
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::ImageBuild { .. } => "image build",
            Self::VmCreate { .. } => "vm create",
            Self::VmActivate { .. } => "vm activate",
            Self::VmStart { .. } => "vm start",
            Self::VmStop { .. } => "vm stop",
            Self::VmDelete { .. } => "vm delete",
            Self::VmDock { .. } => "vm dock",
            Self::VmMigrate { .. } => "vm migrate",
            Self::SubstrateCopy { .. } => "substrate copy",
            Self::SubstrateRebuild { .. } => "substrate rebuild",
            Self::PoolCheck { .. } => "pool check",
        }
    }

    /// Whether it is about the cloud as a whole, so that users have nothing to do with it.
    #[must_use]
    pub const fn is_of_cloud(&self) -> bool {
        matches!(self, Self::ImageBuild { .. } | Self::PoolCheck { .. })
    }

    /// The machine that it is about.
    #[must_use]
    pub const fn vm(&self) -> Option<VmId> {
        match self {
            Self::VmCreate { vm, .. }
            | Self::VmActivate { vm, .. }
            | Self::VmStart { vm, .. }
            | Self::VmStop { vm, .. }
            | Self::VmDelete { vm, .. }
            | Self::VmDock { vm, .. }
            | Self::VmMigrate { vm, .. }
            | Self::SubstrateRebuild { vm, .. } => Some(*vm),
            Self::ImageBuild { .. } | Self::SubstrateCopy { .. } | Self::PoolCheck { .. } => None,
        }
    }

    /// What it acts on.
    #[must_use]
    pub const fn target(&self) -> &Name {
        match self {
            Self::ImageBuild { image, .. } => image,
            Self::VmCreate { name, .. }
            | Self::VmActivate { name, .. }
            | Self::VmStart { name, .. }
            | Self::VmStop { name, .. }
            | Self::VmDelete { name, .. }
            | Self::VmDock { name, .. }
            | Self::VmMigrate { name, .. }
            | Self::SubstrateCopy { name, .. }
            | Self::SubstrateRebuild { name, .. } => name,
            Self::PoolCheck { site } => site,
        }
    }
}
