//! Ports of hosts that lead to machines.

use axum::Json;
use axum::extract::State;
use godwit_site::{HostPort, PublishedPort};
use godwit_types::Fault;

use super::{Answer, Api, Path, Payload, Who};
use crate::registry::VmRecord;

/// Has a port of the host of its site lead to an environment, wherever that goes.
#[utoipa::path(post, path = "/v1/vms/{vm}/ports", request_body = PublishedPort,
    params(("vm" = String, Path)),
    responses((status = 200, body = VmRecord), (status = 400, body = Fault), (status = 403, body = Fault),
    (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn publish(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Payload(port): Payload<PublishedPort>,
) -> Answer<Json<VmRecord>> {
    Ok(Json(api.controller.ports.publish(&who, &vm, port).await?))
}

/// Has a port lead to an environment no more.
#[utoipa::path(delete, path = "/v1/vms/{vm}/ports/{protocol}/{port}",
    params(("vm" = String, Path), ("protocol" = String, Path), ("port" = String, Path)),
    responses((status = 200, body = VmRecord), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn unpublish(
    State(api): State<Api>,
    who: Who,
    Path((vm, protocol, port)): Path<(String, String, String)>,
) -> Answer<Json<VmRecord>> {
    let port: HostPort =
        format!("{port}/{protocol}").parse().map_err(|e| Fault::invalid(format!("{e}")))?;
    Ok(Json(api.controller.ports.unpublish(&who, &vm, port).await?))
}
