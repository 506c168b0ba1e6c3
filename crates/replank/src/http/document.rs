//! The API's description (OpenAPI 3.1), made from the routes: what each handler says about itself, and what all have in common.

use std::sync::LazyLock;

use bytes::Bytes;
use http::header;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::response::Response;
use utoipa::openapi::schema::{AllOfBuilder, AnyOfBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Components, ContentBuilder, OpenApi, Ref, RefOr, Schema};
use utoipa::{OpenApi as _, PartialSchema as _, ToSchema as _};

use super::errors::{PROBLEM, Problem};
use super::routes;
use crate::engine::api::StartRequest;

/// The security scheme that routes name; with the scope `admin` where the token's role must be that.
pub const TOKEN: &str = "token";
const ADMIN: &str = "admin";

/// Answers that do not depend on the route. Handlers name only those of their own.
const OF_ALL: &[(&str, &str)] = &[("504", "No answer in time")];
const OF_GUARDED: &[(&str, &str)] = &[
    ("400", "The request is malformed: a header that stands twice, or a parameter that cannot be read"),
    ("421", "This host name is not served here"),
];
const OF_SIGNED_IN: &[(&str, &str)] = &[
    ("401", "No token, or one that is unknown, revoked or expired"),
    ("429", "Too many failed sign-ins, too many open streams, or asked too soon after the last time"),
    ("503", "Something that the service depends on does not answer"),
];
const OF_ADMINS: &[(&str, &str)] = &[("403", "The token's role is not admin")];
const OF_CHANGES: &[(&str, &str)] = &[
    ("403", "The token's role does not allow this, or the request comes from another site"),
    ("413", "The body is too long"),
    ("415", "The body is not declared as application/json"),
    ("422", "The body is JSON and not what it should be"),
];

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "Replank",
    description = "The upgrade button for self-hosted container applications. Sign in with `Authorization: Bearer TOKEN`; \
        tokens are made by `replank token create`. Every error is a problem (RFC 9457), also where nothing is served (404) \
        and where the method is not possible (405); only a head that is too large (431), or none at all, is answered without a body.",
    license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
))]
struct Api;

/// The document as it is served and printed.
pub fn text() -> Bytes {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        let mut text = serde_json::to_vec_pretty(&document()).unwrap_or_default();
        text.push(b'\n');
        text.into()
    });
    TEXT.clone()
}

/// What the routers' handlers begin with.
pub fn empty() -> OpenApi {
    Api::openapi()
}

pub fn document() -> OpenApi {
    let mut document = routes::routes().into_openapi();
    for (path, item) in &mut document.paths.paths {
        let guarded = !super::guard::OPEN.contains(&path.as_str());
        for (operation, changes) in operations(item) {
            complete(operation, guarded, changes);
        }
    }
    let components = document.components.get_or_insert_with(Components::new);
    components.schemas.insert(Problem::name().into_owned(), Problem::schema());
    if let Some(start) = components.schemas.get_mut(StartRequest::name().as_ref()) {
        *start = forms_of_start(start.clone());
    }
    let token = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A token of `replank token create`; its role is reader or admin."))
        .build();
    components.add_security_scheme(TOKEN, SecurityScheme::Http(token));
    document
}

/// Each operation, and whether it may change something.
fn operations(item: &mut PathItem) -> impl Iterator<Item = (&mut Operation, bool)> {
    let looks = [&mut item.get, &mut item.head].into_iter().map(|operation| (operation, false));
    let changes = [&mut item.post, &mut item.put, &mut item.patch, &mut item.delete].into_iter().map(|o| (o, true));
    looks.chain(changes).filter_map(|(operation, changes)| Some((operation.as_mut()?, changes)))
}

fn complete(operation: &mut Operation, guarded: bool, changes: bool) {
    let needed = serde_json::to_string(&operation.security).unwrap_or_default();
    let (signed_in, admin) = (needed.contains(TOKEN), needed.contains(ADMIN));
    let groups =
        [(true, OF_ALL), (guarded, OF_GUARDED), (signed_in, OF_SIGNED_IN), (changes, OF_CHANGES), (admin, OF_ADMINS)];
    let answers = &mut operation.responses.responses;
    for (status, why) in groups.into_iter().filter(|(applies, _)| *applies).flat_map(|(_, group)| group) {
        answers.entry((*status).to_owned()).or_insert_with(|| RefOr::T(Response::new(*why)));
    }
    for (status, answer) in answers.iter_mut() {
        let RefOr::T(answer) = answer else { continue };
        if !status.starts_with(['4', '5']) {
            continue;
        }
        let schema = || Ref::from_schema_name(Problem::name());
        let problem = || RefOr::T(ContentBuilder::new().schema(Some(schema())).build());
        answer.content.entry(PROBLEM.to_owned()).or_insert_with(problem);
        let (name, schema, why) = match status.as_str() {
            "401" => (header::WWW_AUTHENTICATE, Type::String, "`Bearer`"),
            "429" | "503" => (header::RETRY_AFTER, Type::Integer, "Seconds to wait before the next try"),
            _ => continue,
        };
        let schema = ObjectBuilder::new().schema_type(schema).build();
        let header = HeaderBuilder::new().schema(Some(schema)).description(Some(why)).build();
        answer.headers.insert(name.to_string(), RefOr::T(header));
    }
}

/// What a start means depends on which of its fields are there together; types alone do not say that.
fn forms_of_start(fields: RefOr<Schema>) -> RefOr<Schema> {
    let null = || ObjectBuilder::new().schema_type(Type::Null);
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let kind = |name: &str| {
        let may_be_null = SchemaType::from_iter([Type::String, Type::Null]);
        ObjectBuilder::new()
            .schema_type(may_be_null)
            .enum_values(Some([serde_json::Value::from(name), serde_json::Value::Null]))
    };
    let newest = ObjectBuilder::new()
        .description(Some("The newest release"))
        .property("target_version", null())
        .property("target_sha", null())
        .property("target_kind", kind("release"));
    let release = ObjectBuilder::new()
        .description(Some("A release by its version; with `target_sha` only if it is still at that commit"))
        .property("target_version", text().pattern(Some(r"^v?[0-9]+\.[0-9]+\.[0-9]+$")))
        .required("target_version")
        .property("target_kind", kind("release"));
    let commit = ObjectBuilder::new()
        .description(Some("The recorded head of the tracking branch; the server derives the version"))
        .property("target_sha", text())
        .required("target_sha")
        .property("target_version", null())
        .property("target_kind", kind("commit"));
    let forms = AnyOfBuilder::new().item(newest).item(release).item(commit);
    AllOfBuilder::new().item(fields).item(Schema::AnyOf(forms.build())).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use axum::Router;

    use super::*;

    /// axum shows its paths in its debug output alone. Should that change, nothing is found, and this fails.
    #[test]
    fn every_route_is_in_the_document_and_the_other_way_round() {
        let router = format!("{:?}", Router::from(routes::routes()));
        // The last two are axum's own, for what has no route.
        let is_route = |text: &&str| text.starts_with('/') && *text != "/" && !text.contains("__private__");
        let served: BTreeSet<&str> = router.split('"').filter(is_route).collect();
        let document = document();
        let documented: BTreeSet<&str> = document.paths.paths.keys().map(String::as_str).collect();
        assert_eq!(served, documented, "a route is made with `#[utoipa::path]` and `routes!`, see routes.rs");
        assert!(served.len() > 15);
    }
}
