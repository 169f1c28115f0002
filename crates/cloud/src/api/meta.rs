//! Health, metrics, and the description of the API.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use godwit_types::{SiteState, UnixMs, VmState};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, Who};
use crate::access::{Action, Object};
use crate::controller::authorize::allow;

/// That the daemon serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// Version of the daemon.
    pub version: String,
}

/// Whether the daemon serves and its registry can be read.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = Health)))]
pub(super) async fn healthz(State(api): State<Api>) -> Answer<Json<Health>> {
    api.controller.registry().sites().all()?;
    Ok(Json(Health { status: "ok".into(), version: env!("CARGO_PKG_VERSION").into() }))
}

pub(super) async fn spec() -> Json<utoipa::openapi::OpenApi> {
    Json(super::openapi())
}

/// Prometheus metrics.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
pub(super) async fn metrics(State(api): State<Api>, who: Who) -> Answer<impl IntoResponse> {
    allow(&who, Action::See, &Object::Cloud, ("site", ""))?;
    let now = UnixMs::now();
    let registry = api.controller.registry();
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, rows: Vec<(String, f64)>| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in rows {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let sites = registry.sites().all()?;
    family(
        "godwit_site_up",
        "gauge",
        "Whether the site's lease is fresh.",
        sites
            .iter()
            .map(|s| {
                let up = f64::from(u8::from(s.state(now) == SiteState::Ready));
                (format!("{{site=\"{}\"}}", s.name), up)
            })
            .collect(),
    );
    family(
        "godwit_site_memory_free_bytes",
        "gauge",
        "Memory not in use at the site.",
        sites
            .iter()
            .map(|s| {
                let bytes = s.report.memory_free_mib as f64 * 1048576.0;
                (format!("{{site=\"{}\"}}", s.name), bytes)
            })
            .collect(),
    );
    let mut vms: BTreeMap<(String, VmStateKey), u32> = BTreeMap::new();
    for vm in registry.vms()? {
        *vms.entry((vm.site.to_string(), VmStateKey(vm.state))).or_default() += 1;
    }
    family(
        "godwit_environments",
        "gauge",
        "Execution environments by site and state.",
        vms.into_iter()
            .map(|((site, s), n)| (format!("{{site=\"{site}\",state=\"{}\"}}", s.0), f64::from(n)))
            .collect(),
    );
    let substrates = registry.substrates()?;
    family(
        "godwit_substrates",
        "gauge",
        "Substrates in the pools.",
        vec![(String::new(), substrates.len() as f64)],
    );
    family(
        "godwit_registry_commits_total",
        "counter",
        "Write transactions of the registry since the daemon started.",
        vec![(String::new(), registry.commits() as f64)],
    );
    family(
        "godwit_registry_damaged_entries",
        "gauge",
        "Entries of the registry that do not parse and are left out.",
        vec![(String::new(), registry.damaged().len() as f64)],
    );
    let ops = api.controller.ops().counts();
    family(
        "godwit_operations",
        "gauge",
        "Operations that are kept, by kind and state.",
        ops.into_iter()
            .map(|((verb, state), n)| {
                (format!("{{kind=\"{verb}\",state=\"{state}\"}}"), f64::from(n))
            })
            .collect(),
    );
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], out))
}

#[derive(PartialEq, Eq)]
struct VmStateKey(VmState);

impl Ord for VmStateKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.to_string().cmp(&other.0.to_string())
    }
}
impl PartialOrd for VmStateKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
