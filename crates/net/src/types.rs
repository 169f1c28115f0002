//! What a network is, and a machine's place in it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use godwit_qemu::MacAddress;
use godwit_types::{Name, NetworkId};
use serde::{Deserialize, Serialize};

/// What machines of a network reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkKind {
    /// Each other, and the world under an address of their site.
    Nat,
    /// Each other.
    Private,
}

impl fmt::Display for NetworkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::Private => "private",
        })
    }
}

impl FromStr for NetworkKind {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "nat" => Ok(Self::Nat),
            "private" => Ok(Self::Private),
            _ => Err("it is nat or private".into()),
        }
    }
}

/// The addresses of a network, such as `10.80.0.0/24`.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    first: Ipv4Addr,
    bits: u8,
}

/// Why a text is no [`Prefix`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{shown}' is not a network's prefix: give the first address of a private range and 16 to 29 \
     bits, such as 10.80.0.0/24"
)]
pub struct PrefixError {
    shown: String,
}

impl Prefix {
    /// The prefix of a network when nothing else is said.
    pub const DEFAULT: Self = Self { first: Ipv4Addr::new(10, 80, 0, 0), bits: 24 };

    /// How many bits its addresses share.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// The gateway and name server: the first address that a host can have.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() + 1)
    }

    /// The mask.
    #[must_use]
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.bits)))
    }

    /// The first address, which is the network's.
    #[must_use]
    pub const fn first(self) -> Ipv4Addr {
        self.first
    }

    /// The addresses that machines may have, in order.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        let first = self.first.to_bits();
        let last = first | !self.mask().to_bits();
        (first + 2..last).map(Ipv4Addr::from_bits)
    }

    /// Whether a machine may have `address`.
    #[must_use]
    pub fn is_host(self, address: Ipv4Addr) -> bool {
        let (at, first) = (address.to_bits(), self.first.to_bits());
        at >= first + 2 && at < first | !self.mask().to_bits()
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;
    fn from_str(s: &str) -> Result<Self, PrefixError> {
        let bad =
            || PrefixError { shown: s.chars().take(40).flat_map(char::escape_debug).collect() };
        let (first, bits) = s.split_once('/').ok_or_else(bad)?;
        let first: Ipv4Addr = first.parse().map_err(|_| bad())?;
        let bits: u8 = bits.parse().map_err(|_| bad())?;
        let prefix = Self { first, bits };
        if !(16..=29).contains(&bits) || !first.is_private() {
            return Err(bad());
        }
        if first.to_bits() & !prefix.mask().to_bits() != 0 {
            return Err(bad());
        }
        Ok(prefix)
    }
}

impl From<Prefix> for String {
    fn from(p: Prefix) -> Self {
        p.to_string()
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;
    fn try_from(s: String) -> Result<Self, PrefixError> {
        s.parse()
    }
}

/// A network, as its sites know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: Name,
    /// What its machines reach.
    pub kind: NetworkKind,
    /// Its addresses.
    pub prefix: Prefix,
}

/// A machine's place in a network. It stays with the machine wherever that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network.
    pub network: Network,
    /// The address of the machine's NIC.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub address: Ipv4Addr,
}

impl Attachment {
    /// Checks that the address is one of the network's.
    ///
    /// # Errors
    /// Words for one that is not.
    pub fn check(&self) -> Result<(), String> {
        if self.network.prefix.is_host(self.address) {
            return Ok(());
        }
        Err(format!("{} is no address for a machine in {}", self.address, self.network.prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_prefix_is_private_and_begins_where_it_says() {
        let prefix: Prefix = "10.80.0.0/24".parse().expect("good");
        assert_eq!(prefix, Prefix::DEFAULT);
        assert_eq!(prefix.gateway(), Ipv4Addr::new(10, 80, 0, 1));
        assert_eq!(prefix.mask(), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(prefix.hosts().count(), 253);
        assert!(prefix.hosts().all(|a| prefix.is_host(a)));
        for not in ["10.80.0.0", "10.80.0.1", "10.80.0.255", "10.81.0.2"] {
            assert!(!prefix.is_host(not.parse().expect("address")), "{not}");
        }
        for bad in ["10.80.0.1/24", "8.8.8.0/24", "10.0.0.0/8", "10.0.0.0/30", "10.0.0.0", "x/24"] {
            let _ = bad.parse::<Prefix>().expect_err(bad);
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(s in "\\PC{0,24}") {
            let _ = s.parse::<Prefix>();
        }
    }
}
