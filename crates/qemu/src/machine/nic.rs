//! NICs that come and go.

use std::time::Duration;

use serde_json::json;
use tracing::warn;

use super::Machine;
use super::life::Action;
use crate::args;
use crate::error::QemuError;
use crate::launch::{check_nic, open_tap};
use crate::qmp::QmpError;
use crate::spec::{Nic, NicBackend};

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
        let tap = args::tap_fd_name(nic.port);
        let (netdev, device) = args::nic(&nic, &tap);
        let id = netdev["id"].clone();
        if let NicBackend::Tap(of) = &nic.backend {
            let fd = open_tap(&self.launched().name, of)?;
            self.inner.qmp.hand(&tap, &fd).await?;
        }
        if let Err(e) = self.qmp("netdev_add", netdev).await {
            if matches!(nic.backend, NicBackend::Tap(_)) {
                // It would keep the TAP from the next try.
                let _ = self.qmp("closefd", json!({ "fdname": tap })).await;
            }
            return Err(e);
        }
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

    /// Has `nic` in its port and working, whatever was done to that port before and broke off: a NIC
    /// that is there, or on its way out, is taken away first. Does the same when called again.
    ///
    /// # Errors
    /// A guest that does not let the old one go, or a QEMU that does not take the new one.
    pub async fn replug_nic(&self, nic: Nic) -> Result<(), QemuError> {
        {
            let _one = self.inner.changing.lock().await;
            self.allowed(Action::Change).await?;
            let (id, net) = (format!("nic{}", nic.port), format!("net{}", nic.port));
            let mut events = self.events();
            let asked = self.qmp("device_del", json!({ "id": id })).await;
            match asked {
                Err(QemuError::Qmp(QmpError::Refused { class, .. }))
                    if class == "DeviceNotFound" => {}
                // Refused while an earlier request is on its way to the guest.
                Ok(_) | Err(QemuError::Qmp(QmpError::Refused { .. })) => {
                    self.wait_unplugged(&mut events, &id).await?;
                }
                Err(e) => return Err(e),
            }
            match self.qmp("netdev_del", json!({ "id": net })).await {
                // There was none any more.
                Ok(_) | Err(QemuError::Qmp(QmpError::Refused { .. })) => {}
                Err(e) => return Err(e),
            }
            self.record(|launch| launch.nics.retain(|n| n.port != nic.port))?;
        }
        self.plug_nic(nic).await
    }

    async fn wait_unplugged(
        &self,
        events: &mut crate::qmp::EventCursor,
        id: &str,
    ) -> Result<(), QemuError> {
        // Gone before `events` was taken, or it says so.
        if !self.has_device(id).await? {
            return Ok(());
        }
        events
            .wait_for("DEVICE_DELETED", UNPLUG_WITHIN, |e| {
                e.name == "DEVICE_DELETED" && e.data["device"] == *id
            })
            .await?;
        Ok(())
    }

    async fn has_device(&self, id: &str) -> Result<bool, QemuError> {
        let all = self.qmp("qom-list", json!({ "path": "/machine/peripheral" })).await?;
        Ok(all.as_array().is_some_and(|all| all.iter().any(|d| d["name"] == *id)))
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
