//! Co-scheduling of the vCPUs of this host's machines, by the user-space service.

use godwit_sched_host::service::{Service, StartError};
use godwit_sched_host::{config, journal::JournalError};

/// Starts the service for the machines that Godwit's sites run on this host; those of others are
/// left alone. Where it may not work the site does without, and its log says why.
///
/// One site of a host does it for all; when that ends, the next that starts does.
pub(super) fn start() -> Option<Service> {
    let config = config::Config {
        mark: Some(godwit_qemu::MACHINE_VARIABLE.to_owned()),
        ..config::Config::default()
    };
    match Service::start(config) {
        Ok(service) => {
            for lesser in service.status().lesser {
                tracing::info!("co-scheduling without {lesser}");
            }
            Some(service)
        }
        Err(StartError::Journal(e @ JournalError::Held { .. })) => {
            tracing::info!("siblings are scheduled by another service: {e}");
            None
        }
        Err(e) => {
            tracing::warn!(error = %e, "vCPUs are scheduled as the kernel likes");
            None
        }
    }
}
