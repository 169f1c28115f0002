//! Operations.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures::Stream;
use godwit_types::{Fault, OpId};

use super::{Answer, Api, Path, Who};
use crate::access::Action;
use crate::registry::OpRecord;

fn id(text: &str) -> Result<OpId, Fault> {
    text.parse().map_err(|_| Fault::invalid("an operation is named by its id (a UUID)"))
}

/// All operations that are kept, oldest first.
#[utoipa::path(get, path = "/v1/ops", responses((status = 200, body = Vec<OpRecord>)))]
pub(super) async fn list(State(api): State<Api>, who: Who) -> Answer<Json<Vec<OpRecord>>> {
    Ok(Json(api.controller.finder.ops_for(&who)?))
}

/// One operation.
#[utoipa::path(get, path = "/v1/ops/{id}", params(("id" = String, Path)),
    responses((status = 200, body = OpRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(op): Path<String>,
) -> Answer<Json<OpRecord>> {
    let rx = api.controller.finder.op_for(&who, Action::See, id(&op)?)?;
    let now = rx.borrow().clone();
    Ok(Json(now))
}

/// An operation's state each time it changes, at most 20 times a second, as server-sent events;
/// the stream ends after the final one.
#[utoipa::path(get, path = "/v1/ops/{id}/events", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = OpRecord)))]
pub(super) async fn events(
    State(api): State<Api>,
    who: Who,
    Path(op): Path<String>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let rx = api.controller.finder.op_for(&who, Action::See, id(&op)?)?;
    let stream = futures::stream::unfold(Some((rx, true)), |state| async move {
        let (mut rx, first) = state?;
        if !first {
            // A closed channel means that the final value is in place.
            let _ = rx.changed().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let now = rx.borrow_and_update().clone();
        let event = Event::default().json_data(&now).unwrap_or_else(|_| Event::default());
        let ended = now.state.is_final() || rx.has_changed().is_err() && !first;
        Some((Ok(event), (!ended).then_some((rx, false))))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

/// Asks an operation to stop.
#[utoipa::path(post, path = "/v1/ops/{id}/cancel", params(("id" = String, Path)),
    responses((status = 202), (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn cancel(
    State(api): State<Api>,
    who: Who,
    Path(op): Path<String>,
) -> Answer<StatusCode> {
    api.controller.finder.cancel(&who, id(&op)?)?;
    Ok(StatusCode::ACCEPTED)
}
