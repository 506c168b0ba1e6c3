//! Names of what Replank makes on an engine, and the order that they keep among networks.
//!
//! A container on several networks takes its default route, its published ports and its first answer for a name from the
//! network whose name sorts first (libnetwork; seen on engine 20.10). So private networks begin with `0-`: inside a
//! revision `api` is that revision's api, whatever a shared network calls `api`. And the proxy's own network sorts before
//! every revision's, so that its published ports never move while revisions come and go.

use replank_core::fault::Fault;
use replank_core::words::{AppName, ContainerName, RevisionId};

const NETWORK_PREFIX: &str = "0-replank-";

pub fn container(application: &AppName, revision: &RevisionId, container: &ContainerName) -> String {
    format!("replank-{application}-{revision}-{container}")
}

/// The private network of one revision.
pub fn network(application: &AppName, revision: &RevisionId) -> String {
    format!("{NETWORK_PREFIX}{application}-{revision}")
}

pub fn proxy(application: &AppName) -> String {
    format!("replank-{application}-proxy")
}

/// While the proxy is upgraded: the new container before it has the name.
pub(super) fn proxy_next(application: &AppName) -> String {
    format!("{}-next", proxy(application))
}

/// While the proxy is upgraded: the old container, once the new one has the name.
pub(super) fn proxy_old(application: &AppName) -> String {
    format!("{}-old", proxy(application))
}

/// While an image is tried as a proxy's.
pub(super) fn proxy_trial(application: &AppName) -> String {
    format!("{}-trial", proxy(application))
}

/// The proxy's own network. Application names begin with a letter, so the second '-' sorts before any revision's network.
pub fn proxy_network(application: &AppName) -> String {
    format!("{NETWORK_PREFIX}-{application}")
}

/// A shared network must sort after the private ones, or names inside a revision would resolve to what serves.
pub(super) fn check_shared_network(network: &str) -> Result<(), Fault> {
    let valid = !network.is_empty()
        && network.len() <= 128
        && network.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if !valid {
        return Err(Fault::permanent(format!("shared network {network:?} is not a network's name"))
            .advice("give the name of an existing network of the engine"));
    }
    if matches!(network, "bridge" | "host" | "none") {
        return Err(Fault::permanent(format!("{network:?} cannot be a shared network"))
            .advice("make one with `docker network create` and name that"));
    }
    if network.as_bytes() < b"1".as_slice() {
        return Err(Fault::permanent(format!("shared network {network:?} sorts before Replank's own networks"))
            .advice("choose a network whose name does not begin with '0': the engine resolves names in that order"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_s_own_network_sorts_first_and_shared_ones_last() {
        let app = |s: &str| AppName::new(s).expect("name");
        let own = proxy_network(&app("zoo"));
        for revision in ["a", "r-1", "zz"] {
            let private = network(&app("zoo"), &RevisionId::new(revision).expect("revision"));
            assert!(own < private, "{own} {private}");
            for shared in ["1", "A", "Zed", "aaa", "db", "replank"] {
                assert!(check_shared_network(shared).is_ok(), "{shared}");
                assert!(private.as_str() < shared, "{private} {shared}");
            }
        }
        for bad in ["", "0db", "0", "host", "a b", "00-x"] {
            assert!(check_shared_network(bad).is_err(), "{bad:?}");
        }
    }
}
