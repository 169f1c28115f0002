//! NICs that come and go.

use std::time::Duration;

use serde_json::json;
use tracing::warn;

use super::Machine;
use super::life::Action;
use crate::args;
use crate::error::QemuError;
use crate::launch::check_nic;
use crate::spec::Nic;

/// How long a guest may take to let a NIC go.
const UNPLUG_WITHIN: Duration = Duration::from_secs(30);

impl Machine {
    /// Plugs a NIC into a free port.
    ///
    /// # Errors
    /// A port that is not there or taken.
    pub async fn plug_nic(&self, nic: Nic) -> Result<(), QemuError> {
        let _one = self.inner.changing.lock().await;
        self.allowed(Action::Change).await?;
        self.check_port(&nic)?;
        let (netdev, device) = args::nic(&nic);
        let id = netdev["id"].clone();
        self.qmp("netdev_add", netdev).await?;
        if let Err(e) = self.qmp("device_add", device).await {
            if let Err(also) = self.qmp("netdev_del", json!({ "id": id })).await {
                warn!(error = %also, "the host side of a NIC stays");
            }
            return Err(e);
        }
        self.record(|launch| launch.nics.push(nic))
    }

    fn check_port(&self, nic: &Nic) -> Result<(), QemuError> {
        let launch = self.launched();
        let refuse = |why| Err(QemuError::Launch { name: launch.name.to_string(), why });
        check_nic(nic, &launch.spec).or_else(refuse)?;
        if launch.nics.iter().any(|n| n.port == nic.port) {
            return refuse(format!("NIC port {} is taken", nic.port));
        }
        Ok(())
    }

    /// Takes the NIC in `port` away. The guest has to agree, so it must run and have booted.
    ///
    /// # Errors
    /// An empty port, or a guest that does not let go within 30 s.
    pub async fn unplug_nic(&self, port: u8) -> Result<(), QemuError> {
        let _one = self.inner.changing.lock().await;
        self.allowed(Action::Change).await?;
        let (id, net) = (format!("nic{port}"), format!("net{port}"));
        let mut events = self.events();
        self.qmp("device_del", json!({ "id": id })).await?;
        events
            .wait_for("DEVICE_DELETED", UNPLUG_WITHIN, |e| {
                e.name == "DEVICE_DELETED" && e.data["device"] == *id
            })
            .await?;
        self.qmp("netdev_del", json!({ "id": net })).await?;
        self.record(|launch| launch.nics.retain(|n| n.port != port))
    }
}
