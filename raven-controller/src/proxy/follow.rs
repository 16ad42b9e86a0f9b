//! What the L7 half needs of the API server's objects, kept by watches.

use std::{collections::BTreeMap, fmt::Debug, net::IpAddr, time::Duration};

use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Service};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt,
        reflector::{self, Store},
        watcher,
    },
};
use raven_api::{Gateway, GatewayNode, proxy::INTERNAL_SERVICE};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use crate::config::CONFIG_MAP;
use crate::gateway::{NodeFacts, Switches};

/// Changes that follow each other this closely are one.
const SETTLE: Duration = Duration::from_millis(200);
/// … for so long.
const BURST: Duration = Duration::from_secs(1);

/// The cluster, as far as the L7 half looks at it; clones see the same.
#[derive(Clone)]
pub struct Cluster {
    gateways: Store<Gateway>,
    gateway_nodes: Store<GatewayNode>,
    nodes: Store<Node>,
    services: Store<Service>,
    switches: Store<ConfigMap>,
}

/// Yields when something has changed.
pub struct Changes(BoxStream<'static, ()>);

/// Starts to follow.
pub fn follow(client: Client, namespace: &str) -> (Cluster, Changes) {
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let (gateways, a) = reflected(Api::all(client.clone()), watcher::Config::default());
    let (gateway_nodes, b) = reflected(Api::all(client.clone()), watcher::Config::default());
    let (nodes, c) = reflected(Api::all(client.clone()), watcher::Config::default());
    let (services, d) = reflected(Api::namespaced(client.clone(), namespace), named(INTERNAL_SERVICE));
    let (switches, e) = reflected(Api::namespaced(client, namespace), named(CONFIG_MAP));
    (Cluster { gateways, gateway_nodes, nodes, services, switches }, Changes(stream::select_all([a, b, c, d, e]).boxed()))
}

fn reflected<K>(api: Api<K>, config: watcher::Config) -> (Store<K>, BoxStream<'static, ()>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher::watcher(api, config).default_backoff().reflect(writer).filter_map(|event| async move {
        match event {
            Ok(watcher::Event::InitDone | watcher::Event::Apply(_) | watcher::Event::Delete(_)) => Some(()),
            Ok(_) => None,
            Err(e) => {
                tracing::warn!(kind = %std::any::type_name::<K>(), error = %e, "watch for the proxy (does RBAC allow it?)");
                None
            }
        }
    });
    (store, events.boxed())
}

impl Changes {
    /// Waits for the next change, and for those that come right after it.
    pub async fn next(&mut self) {
        if self.0.next().await.is_none() {
            std::future::pending::<()>().await;
        }
        // In a large cluster there is no pause at all.
        let end = Instant::now() + BURST;
        while let Ok(Some(())) = timeout_at(end.min(Instant::now() + SETTLE), self.0.next()).await {}
    }
}

impl Cluster {
    /// True once everything was listed.
    pub fn complete(&self) -> bool {
        use futures::FutureExt;
        self.gateways.wait_until_ready().now_or_never().is_some()
            && self.gateway_nodes.wait_until_ready().now_or_never().is_some()
            && self.nodes.wait_until_ready().now_or_never().is_some()
            && self.services.wait_until_ready().now_or_never().is_some()
            && self.switches.wait_until_ready().now_or_never().is_some()
    }

    /// All Gateways.
    pub fn gateways(&self) -> Vec<Gateway> {
        self.gateways.state().iter().map(|g| (**g).clone()).collect()
    }

    /// All GatewayNodes.
    pub fn gateway_nodes(&self) -> Vec<GatewayNode> {
        self.gateway_nodes.state().iter().map(|n| (**n).clone()).collect()
    }

    /// All Nodes.
    pub fn nodes(&self) -> Vec<NodeFacts> {
        self.nodes.state().iter().filter_map(|n| NodeFacts::parse(n)).collect()
    }

    /// UIDs of all Nodes, by name.
    pub fn node_uids(&self) -> BTreeMap<String, String> {
        self.nodes.state().iter().filter_map(|n| Some((n.metadata.name.clone()?, n.metadata.uid.clone()?))).collect()
    }

    /// Addresses of the internal Service.
    pub fn service(&self) -> Vec<IpAddr> {
        let services = self.services.state();
        let specs = services.iter().filter_map(|s| s.spec.as_ref());
        specs.flat_map(|spec| spec.cluster_ips.iter().flatten()).filter_map(|ip| ip.parse().ok()).collect()
    }

    /// L7 is on.
    pub fn l7(&self) -> bool {
        self.switches.state().first().map(|map| Switches::parse(&map.data.clone().unwrap_or_default())).unwrap_or_default().l7
    }
}
