//! What the L7 half needs of the API server's objects, kept by watches.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use futures::{
    Stream, StreamExt,
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
use raven_api::{Gateway, GatewayNode, Guarded, proxy::INTERNAL_SERVICE};
use tokio::time::{Instant, timeout_at};

use crate::config::CONFIG_MAP;
use crate::gateway::{NodeFacts, Switches};
use crate::watch::{events, guarded};

/// Changes that follow each other this closely are one.
const SETTLE: Duration = Duration::from_millis(200);
/// … for so long.
const BURST: Duration = Duration::from_secs(1);

/// The cluster, as far as the L7 half looks at it; clones see the same.
#[derive(Clone)]
pub struct Cluster {
    gateways: Store<Gateway>,
    gateway_nodes: Store<Guarded<GatewayNode>>,
    nodes: Store<Guarded<Node>>,
    services: Store<Service>,
    switches: Store<ConfigMap>,
}

/// Yields when something has changed.
pub struct Changes(BoxStream<'static, ()>);

/// Starts to follow.
pub fn follow(client: Client, namespace: &str) -> (Cluster, Changes) {
    let all = watcher::Config::default;
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let (gateways, a) = reflected(events(Api::all(client.clone()), all()));
    let (gateway_nodes, b) = reflected(guarded("GatewayNode", Api::all(client.clone()), all()));
    let (nodes, c) = reflected(guarded("Node", Api::all(client.clone()), all()));
    let (services, d) = reflected(events(Api::namespaced(client.clone(), namespace), named(INTERNAL_SERVICE)));
    let (switches, e) = reflected(events(Api::namespaced(client, namespace), named(CONFIG_MAP)));
    (Cluster { gateways, gateway_nodes, nodes, services, switches }, Changes(stream::select_all([a, b, c, d, e]).boxed()))
}

fn reflected<K>(events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static) -> (Store<K>, BoxStream<'static, ()>)
where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = events.reflect(writer).filter_map(|event| async move {
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

    /// All GatewayNodes that can be read.
    pub fn gateway_nodes(&self) -> Vec<GatewayNode> {
        self.gateway_nodes.state().iter().filter_map(|n| n.0.as_ref().ok().cloned()).collect()
    }

    /// All Nodes that can be read.
    pub fn nodes(&self) -> Vec<NodeFacts> {
        self.nodes.state().iter().filter_map(|n| NodeFacts::parse(n.0.as_ref().ok()?)).collect()
    }

    /// UIDs of these, by name.
    pub fn node_uids(&self) -> BTreeMap<String, String> {
        let nodes = self.nodes.state();
        let read = nodes.iter().filter_map(|n| n.0.as_ref().ok());
        read.filter_map(|n| Some((n.metadata.name.clone()?, n.metadata.uid.clone()?))).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_api::{FakeApi, list};

    #[tokio::test]
    async fn what_one_box_writes_about_itself_stops_nothing() {
        let api = FakeApi::serve(|asked| {
            Ok(match asked {
                "GET /apis/raven.openyurt.io/v1beta1/gatewaynodes" => list(&[
                    r#"{"metadata":{"name":"stolen"},"spec":{},"status":{"peers":[{"nodeName":"y","gateway":"y","lastHandshake":"2026-01-01T00:00:00+99:99"}]}}"#,
                    r#"{"metadata":{"name":"taken","managedFields":[{"manager":"x","time":"9999-12-31T23:59:59Z"}]},"spec":{}}"#,
                    r#"{"metadata":{"name":"good"},"spec":{}}"#,
                ]),
                "GET /api/v1/nodes" => list(&[
                    r#"{"metadata":{"name":"stolen","uid":"1"},"status":{"conditions":[{"type":"X","status":"True","lastHeartbeatTime":"9999-12-31T23:59:59Z"}]}}"#,
                    r#"{"metadata":{"name":"good","uid":"2"}}"#,
                ]),
                _ => list(&[]),
            })
        })
        .await;
        let (cluster, mut changes) = follow(api.client.clone(), "kube-system");
        let listed = tokio::time::timeout(Duration::from_secs(10), async {
            while !cluster.complete() {
                changes.next().await;
            }
        });
        listed.await.expect("everything is listed");
        let names: Vec<String> = cluster.gateway_nodes().into_iter().filter_map(|node| node.metadata.name).collect();
        assert_eq!(names, ["good"]);
        assert_eq!(cluster.nodes().iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["good"]);
        assert_eq!(cluster.node_uids(), BTreeMap::from([("good".to_owned(), "2".to_owned())]));
    }
}
