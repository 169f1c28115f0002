//! Guest images.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use godwit_site::ImageInfo;
use godwit_types::{Fault, Name};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Answer, Api, Params, Path, Who, accepted, name};
use crate::access::{Action, Object};
use crate::controller::authorize::allow;
use crate::controller::{Mode, Unanswered, ask_all};

/// An image and the site that has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(super) struct SiteImage {
    /// The site.
    site: Name,
    /// The image.
    #[serde(flatten)]
    image: ImageInfo,
}

/// The images of the sites that answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(super) struct ImageList {
    /// What they have.
    images: Vec<SiteImage>,
    /// The sites that did not answer.
    unanswered: Vec<Unanswered>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct At {
    /// Only this site.
    site: Option<Name>,
    /// Check and tell, change nothing.
    #[serde(default)]
    dry_run: bool,
}

/// All images at all sites. A site that does not answer in time is named beside them.
#[utoipa::path(get, path = "/v1/images", params(At), responses((status = 200, body = ImageList)))]
pub(super) async fn list(
    State(api): State<Api>,
    who: Who,
    Params(at): Params<At>,
) -> Answer<Json<ImageList>> {
    allow(&who, Action::See, &Object::Image, ("image", ""))?;
    let hosts = match &at.site {
        Some(s) => vec![api.controller.sites.host(s)?],
        None => api.controller.sites.hosts(),
    };
    let all = ask_all(hosts, async |host| host.images().await).await;
    let at = |(site, images): (Name, Vec<ImageInfo>)| {
        images.into_iter().map(move |image| SiteImage { site: site.clone(), image })
    };
    let images = all.answers.into_iter().flat_map(at).collect();
    Ok(Json(ImageList { images, unanswered: all.unanswered }))
}

/// One image, as the first site that has it tells.
#[utoipa::path(get, path = "/v1/images/{name}", params(("name" = String, Path)),
    responses((status = 200, body = ImageInfo), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(image): Path<String>,
) -> Answer<Json<ImageInfo>> {
    allow(&who, Action::See, &Object::Image, ("image", &image))?;
    Ok(Json(api.controller.sites.image(&name(&image)?).await?))
}

/// Removes an image from a site, or from every site, with its older builds.
#[utoipa::path(delete, path = "/v1/images/{name}", params(("name" = String, Path), At),
    responses((status = 200, body = crate::controller::Accepted), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn remove(
    State(api): State<Api>,
    who: Who,
    Path(image): Path<String>,
    Params(at): Params<At>,
) -> Answer<Response> {
    let mode = if at.dry_run { Mode::DryRun } else { Mode::Act };
    Ok(accepted(api.controller.pool.image_delete(&who, &name(&image)?, at.site, mode).await?))
}

/// Builds an image from its recipe, at the center unless a site is named.
#[utoipa::path(post, path = "/v1/images/{name}/build", params(("name" = String, Path), At),
    responses((status = 202, body = crate::controller::Accepted)))]
pub(super) async fn build(
    State(api): State<Api>,
    who: Who,
    Path(image): Path<String>,
    Params(at): Params<At>,
) -> Answer<Response> {
    let mode = if at.dry_run { Mode::DryRun } else { Mode::Act };
    Ok(accepted(api.controller.pool.image_build(&who, name(&image)?, at.site, mode)?))
}
