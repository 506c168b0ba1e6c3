//! Networks: the private one of each revision, and the shared ones that containers and the proxy stand on.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{EndpointSettings, NetworkConnectRequest, NetworkCreateRequest};
use bollard::query_parameters::ListNetworksOptionsBuilder;
use replank_core::fault::{Class, Fault};
use replank_core::words::RevisionId;

use super::change::{Work, labels_of, look_alike};
use super::{labels, names};
use crate::engine::{classify, is_missing};

const ADDRESSES: &str = "where the engine has no addresses left, see which networks nobody uses (`docker network ls`) and remove \
    them, or give it more (`default-address-pools` in daemon.json)";

impl Work<'_> {
    pub(super) async fn private_network(&self, revision: &RevisionId) -> Result<(), Fault> {
        let name = names::network(&self.platform.config.application, revision);
        self.network(&name, self.platform.owner.network(revision)).await
    }

    /// Makes a network of ours, or finds it. The engine lets two networks have one name, and then serves neither by it: of
    /// two that were made at the same moment, both makers keep the same one.
    pub(super) async fn network(&self, name: &str, labels: BTreeMap<String, String>) -> Result<(), Fault> {
        let request = NetworkCreateRequest {
            name: name.to_owned(),
            driver: Some("bridge".to_owned()),
            labels: Some(labels.clone().into_iter().collect()),
            ..Default::default()
        };
        if self.owned_network(name).await? {
            return Ok(());
        }
        match self.engine.docker().create_network(request).await {
            Ok(made) => self.only_network(name, &made.id).await,
            Err(error) if self.owned_network(name).await? => {
                tracing::debug!(%error, name, "somebody else made the network first");
                Ok(())
            }
            Err(error) => {
                let fault = classify(error, &format!("network {name} cannot be created"));
                // What the engine answers when its addresses are used up, too: nothing was named that could be missing.
                let is_full = fault.class == Class::Permanent;
                Err(if is_full { fault.advice(ADDRESSES) } else { fault })
            }
        }
    }

    async fn only_network(&self, name: &str, mine: &str) -> Result<(), Fault> {
        let filter = HashMap::from([("name".to_owned(), vec![name.to_owned()])]);
        let options = ListNetworksOptionsBuilder::new().filters(&filter).build();
        let listed = self
            .engine
            .docker()
            .list_networks(Some(options))
            .await
            .map_err(|error| classify(error, "the engine's networks cannot be listed"))?;
        let same = listed.into_iter().filter(|network| network.name.as_deref() == Some(name));
        let first = same.filter_map(|network| Some((network.created, network.id?))).min();
        match first {
            Some((_, first)) if first != mine => match self.engine.docker().remove_network(mine).await {
                Ok(()) => Ok(()),
                Err(error) if is_missing(&error) => Ok(()),
                Err(error) => Err(classify(error, &format!("the second network {name} cannot be removed"))),
            },
            _ => Ok(()),
        }
    }

    /// True where it is there and ours; a conflict where it is there and not.
    async fn owned_network(&self, name: &str) -> Result<bool, Fault> {
        match self.engine.docker().inspect_network(name, None).await {
            Ok(found) => {
                let labels = found.labels.unwrap_or_default();
                if self.platform.owner.owns(&labels) {
                    Ok(true)
                } else {
                    Err(Fault::conflict(format!("network {name} exists and is not of this installation"))
                        .advice(format!("look at it with `docker network inspect {name}`; Replank leaves it alone")))
                }
            }
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(classify(error, &format!("network {name} cannot be inspected"))),
        }
    }

    pub(super) async fn join_proxy(&self, network: &str, aliases: &[String]) -> Result<(), Fault> {
        let name = names::proxy(&self.platform.config.application);
        let proxy = self.inspect(&name).await?.ok_or_else(|| {
            Fault::permanent(format!("the proxy's container {name} is not there"))
                .advice("run `replank deploy` to make it")
        })?;
        let labels = labels_of(&proxy);
        if !self.platform.owner.owns(&labels) || labels.get(labels::ROLE).is_none_or(|role| role != labels::ROLE_PROXY)
        {
            return Err(look_alike(&self.platform.owner, &name, &labels));
        }
        let joined = proxy.network_settings.and_then(|n| n.networks).unwrap_or_default();
        if joined.contains_key(network) {
            return Ok(());
        }
        self.join(network, &proxy.id.unwrap_or(name), aliases).await
    }

    pub(super) async fn join(&self, network: &str, container: &str, aliases: &[String]) -> Result<(), Fault> {
        let request = NetworkConnectRequest {
            container: container.to_owned(),
            endpoint_config: Some(EndpointSettings {
                aliases: (!aliases.is_empty()).then(|| aliases.to_vec()),
                ..Default::default()
            }),
        };
        let Err(error) = self.engine.docker().connect_network(network, request).await else { return Ok(()) };
        // The engine answers 403 where the container is already there; somebody else was faster.
        let found = self.inspect(container).await?;
        let joined = found.and_then(|c| c.network_settings).and_then(|n| n.networks).unwrap_or_default();
        if joined.contains_key(network) {
            return Ok(());
        }
        let missing = is_missing(&error);
        let fault = classify(error, &format!("a container cannot join network {network}"));
        Err(if missing {
            fault.advice(format!("make the network with `docker network create {network}`"))
        } else {
            fault
        })
    }
}
