//! What makes a machine itself.

use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use godwit_qemu::MacAddress;
use godwit_types::Name;
use serde::{Deserialize, Serialize};

use crate::error::SubstrateError;

/// The identity that an activated machine is given before its user programs run. The kernel's
/// random numbers are seeded anew in every case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name.
    pub hostname: Name,
    /// `/etc/machine-id`, 32 hex digits.
    pub machine_id: String,
    /// MAC address of its NIC.
    pub mac: MacAddress,
}

impl Identity {
    /// A new identity under `hostname`.
    ///
    /// # Errors
    /// [`SubstrateError::Io`] when the system gives no random numbers.
    pub fn fresh(hostname: Name) -> Result<Self, SubstrateError> {
        let machine_id = uuid::Uuid::new_v4().simple().to_string();
        Ok(Self { hostname, machine_id, mac: fresh_mac()? })
    }
}

pub(crate) fn fresh_mac() -> Result<MacAddress, SubstrateError> {
    Ok(MacAddress::from_seed(random()?))
}

/// What the guest is told to renew it. A machine that keeps its identity gets only a seed and the
/// time; the address of its NIC is the guest's to set when that is `inside`.
pub(crate) fn environment(
    identity: Option<&Identity>,
    inside: bool,
) -> Result<Vec<String>, SubstrateError> {
    let seed: [u8; 32] = random()?;
    let seed: String = seed.iter().map(|b| format!("{b:02x}")).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let mut env = vec![format!("GODWIT_SEED={seed}"), format!("GODWIT_UNIX_NS={now}")];
    if let Some(i) = identity {
        env.push(format!("GODWIT_HOSTNAME={}", i.hostname));
        env.push(format!("GODWIT_MACHINE_ID={}", i.machine_id));
        if inside {
            env.push(format!("GODWIT_MAC={}", i.mac));
        }
    }
    Ok(env)
}

fn random<const N: usize>() -> Result<[u8; N], SubstrateError> {
    let path = Path::new("/dev/urandom");
    let mut out = [0; N];
    std::fs::File::open(path)
        .and_then(|mut f| f.read_exact(&mut out))
        .map_err(SubstrateError::io("reading", path))?;
    Ok(out)
}
