//! Whether a URL is the configured remote.

/// A URL's parts that say where it leads; user and password are not among them.
#[derive(Debug, PartialEq, Eq)]
struct Place<'a> {
    scheme: String,
    authority: String,
    path: &'a str,
    has_user: bool,
}

fn place(url: &str) -> Option<Place<'_>> {
    if url.len() > 2_048 || !url.bytes().all(|b| b.is_ascii_graphic()) || url.contains(['\\', '"', '\'', '`', '<', '>'])
    {
        return None;
    }
    let (scheme, rest) = url.split_once("://")?;
    let at = rest.find('/')?;
    let (authority, path) = rest.split_at(at);
    let (user, host) = match authority.split_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    // A second '@' is read one way by git and another way by its HTTP library.
    if host.is_empty() || host.contains('@') || user.is_some_and(|user| user.contains(['?', '#'])) {
        return None;
    }
    let scheme = scheme.to_ascii_lowercase();
    let known = matches!(scheme.as_str(), "https" | "http");
    known.then(|| Place { scheme, authority: host.to_ascii_lowercase(), path, has_user: user.is_some() })
}

/// The same place, with or without a user.
pub(crate) fn same(configured: &str, given: &str) -> bool {
    match (place(configured), place(given)) {
        (Some(ours), Some(theirs)) => {
            (&ours.scheme, &ours.authority, ours.path) == (&theirs.scheme, &theirs.authority, theirs.path)
        }
        _ => false,
    }
}

/// Scheme, and host with port as written, of a URL that could be the remote.
pub(crate) fn authority(url: &str) -> Option<(String, String)> {
    place(url).map(|place| (place.scheme, place.authority))
}

pub(super) fn has_user(url: &str) -> bool {
    place(url).is_none_or(|place| place.has_user)
}
