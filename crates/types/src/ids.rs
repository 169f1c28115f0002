//! Typed ids. Two kinds of id cannot be mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[derive(utoipa::ToSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh id; ids made later sort later (UUID version 7, RFC 9562).
            #[must_use]
            #[allow(clippy::new_without_default, reason = "a default id would not be unique by reading")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

id!(
    /// An execution environment, wherever it runs.
    VmId
);
id!(
    /// A docked machine in a pool.
    SubstrateId
);
id!(
    /// A network of machines.
    NetworkId
);
id!(
    /// A long job.
    OpId
);
id!(
    /// One migration of one execution environment.
    MigrationId
);
