//! Networks of machines.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_types::Fault;

use super::{Answer, Api, Path, Payload, Who};
use crate::access::Action;
use crate::controller::NewNetwork;
use crate::registry::NetworkRecord;

/// The networks of the tenant; of all tenants for an operator.
#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = Vec<NetworkRecord>)))]
pub(super) async fn list(State(api): State<Api>, who: Who) -> Answer<Json<Vec<NetworkRecord>>> {
    Ok(Json(api.controller.networks.list_for(&who)))
}

/// Makes a network.
#[utoipa::path(post, path = "/v1/networks", request_body = NewNetwork,
    responses((status = 201, body = NetworkRecord), (status = 403, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn create(
    State(api): State<Api>,
    who: Who,
    Payload(new): Payload<NewNetwork>,
) -> Answer<(StatusCode, Json<NetworkRecord>)> {
    Ok((StatusCode::CREATED, Json(api.controller.networks.create(&who, new)?)))
}

/// One network.
#[utoipa::path(get, path = "/v1/networks/{network}", params(("network" = String, Path)),
    responses((status = 200, body = NetworkRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(network): Path<String>,
) -> Answer<Json<NetworkRecord>> {
    Ok(Json(api.controller.networks.find(&who, Action::See, &network)?))
}

/// Removes a network that no machine is in.
#[utoipa::path(delete, path = "/v1/networks/{network}", params(("network" = String, Path)),
    responses((status = 204), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn delete(
    State(api): State<Api>,
    who: Who,
    Path(network): Path<String>,
) -> Answer<StatusCode> {
    api.controller.networks.delete(&who, &network)?;
    Ok(StatusCode::NO_CONTENT)
}
