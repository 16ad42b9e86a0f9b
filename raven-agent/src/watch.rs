//! Watches Gateways, GatewayNodes, three ConfigMaps and the API server's EndpointSlice, and publishes the latest
//! [`Inputs`] once all lists are complete. Bursts of events are coalesced.
//!
//! Nodes and Pods are never watched, so that ten thousand agents cost the API server little.

mod outages;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::IpAddr,
    time::{Duration, Instant as StdInstant},
};

pub use outages::Outages;

use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use k8s_openapi::api::{core::v1::ConfigMap, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{WatchStreamExt, reflector, watcher},
};
use raven_api::{
    Gateway, GatewayNode, Guarded,
    guarded::UnreadableLog,
    names::{AGENT_CONFIG_MAP, API_SERVER_NAMESPACE, API_SERVER_SLICE, SWITCHES_CONFIG_MAP},
    proxy::{CA_KEY, CA_NAME, ready},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    snapshot,
    topology::{ClusterSettings, Inputs},
};

/// The API server's own EndpointSlice. The agent does not wait for this list: if RBAC does not allow it, only the
/// client's own address of the API server is known.
const API_SERVERS: &str = "EndpointSlice kubernetes";
/// Events within this time of each other are one change.
const SETTLE: Duration = Duration::from_millis(50);
/// Maximum length of one change.
const BURST: Duration = Duration::from_secs(1);

/// `Some`: the named list is complete. `None`: an object changed.
type Progress = Option<&'static str>;

/// Runs until the process ends. The last inputs stay valid while the API server is unavailable; `outages` records how
/// long that has been.
pub async fn run(client: Client, namespace: &str, latest: watch::Sender<Option<Inputs>>, outages: Outages) {
    let all = watcher::Config::default;
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), API_SERVER_NAMESPACE);
    let (gateways, a) = reflected("Gateways", Api::<Gateway>::all(client.clone()), all(), &outages);
    let (nodes, b) = reflected("GatewayNodes", Api::<Guarded<GatewayNode>>::all(client), all(), &outages);
    let (switches, c) = reflected(SWITCHES_CONFIG_MAP, configs.clone(), named(SWITCHES_CONFIG_MAP), &outages);
    let (agent, d) = reflected(AGENT_CONFIG_MAP, configs.clone(), named(AGENT_CONFIG_MAP), &outages);
    let (ca, e) = reflected(CA_NAME, configs, named(CA_NAME), &outages);
    // Its outages do not count, because the agent works without it.
    let (api_servers, f) = reflected(API_SERVERS, slices, named(API_SERVER_SLICE), &Outages::default());
    let mut reported = UnreadableLog::new("GatewayNode");
    let mut incomplete = vec!["Gateways", "GatewayNodes", SWITCHES_CONFIG_MAP, AGENT_CONFIG_MAP, CA_NAME];
    let mut events = stream::select_all([a, b, c, d, e, f]);
    while let Some(progress) = events.next().await {
        incomplete.retain(|list| Some(*list) != progress);
        if !incomplete.is_empty() {
            continue;
        }
        // A burst (a roll-out, a list after an outage) is one change until it pauses or reaches its maximum length:
        // every change rebuilds the whole topology.
        let end = Instant::now() + BURST;
        while let Ok(Some(_)) = timeout_at(end.min(Instant::now() + SETTLE), events.next()).await {}
        let (gateways, nodes) = (listed(&gateways), readable(listed(&nodes), &mut reported));
        let data = |store: &reflector::Store<ConfigMap>| {
            store.state().first().and_then(|c| c.data.clone()).unwrap_or_default()
        };
        let inputs = snapshot::lean(&Inputs {
            api_servers: api_servers.state().iter().flat_map(|slice| addresses(slice)).collect(),
            // The only observation in a GatewayNode's status that plans of other nodes depend on.
            ready_proxies: ready(&gateways, &nodes).into_iter().map(str::to_owned).collect(),
            gateways,
            gateway_nodes: nodes,
            settings: ClusterSettings::parse(&data(&switches), &data(&agent)),
            proxy_ca: data(&ca).remove(CA_KEY).unwrap_or_default(),
            resolved: BTreeMap::new(),
        });
        latest.send_if_modified(|have| {
            let resolved = have.as_ref().map(|have| have.resolved.clone()).unwrap_or_default();
            let inputs = Inputs { resolved, ..inputs };
            let changed = have.as_ref() != Some(&inputs);
            if changed {
                *have = Some(inputs);
            }
            changed
        });
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<IpAddr> {
    slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse().ok()).collect()
}

fn listed<K: Resource<DynamicType = ()> + Clone + 'static>(store: &reflector::Store<K>) -> Vec<K> {
    store.state().iter().map(|object| (**object).clone()).collect()
}

/// The GatewayNodes that parse. Nodes write these objects, and the API server accepts timestamps that do not parse
/// here: the object of one (stolen) node must not stop the watch.
fn readable(nodes: Vec<Guarded<GatewayNode>>, reported: &mut UnreadableLog) -> Vec<GatewayNode> {
    reported.retain(nodes.iter());
    let read = nodes.into_iter().filter_map(|node| {
        if let Some(error) = reported.first_failure(&node) {
            tracing::warn!(
                name = node.name_any(),
                error,
                "ignoring a GatewayNode that cannot be parsed; check the node that wrote it"
            );
        }
        node.0.ok()
    });
    read.collect()
}

fn reflected<K>(
    what: &'static str,
    api: Api<K>,
    config: watcher::Config,
    outages: &Outages,
) -> (reflector::Store<K>, BoxStream<'static, Progress>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let outages = outages.clone();
    let events = watcher(api, config)
        .default_backoff()
        .reflect(writer)
        .inspect_err(move |e| {
            tracing::warn!(list = what, error = %e, "watch failed; the last seen objects stay in use until it is restored");
            outages.record(what, e.to_string(), StdInstant::now());
        })
        .filter_map(move |event| async move {
            match event.ok()? {
                watcher::Event::InitDone => Some(Some(what)),
                watcher::Event::Apply(_) | watcher::Event::Delete(_) => Some(None),
                watcher::Event::Init | watcher::Event::InitApply(_) => None,
            }
        })
        .boxed();
    (store, events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_object_of_one_node_does_not_affect_others() {
        let node = |name: &str, handshake: &str| {
            let object = serde_json::json!({
                "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": { "name": name }, "spec": { "gateway": "x", "version": "1" },
                "status": { "peers": [{ "nodeName": "y", "gateway": "y", "lastHandshake": handshake }] },
            });
            serde_json::from_str::<Guarded<GatewayNode>>(&object.to_string()).expect("never an error")
        };
        // Both timestamps pass the API server's validation.
        let list = vec![
            node("good", "2026-01-01T00:00:00Z"),
            node("bad", "2026-01-01T00:00:00+99:99"),
            node("worse", "2026-01-01T00:00:00ZTx"),
        ];
        let mut reported = UnreadableLog::new("GatewayNode");
        let read = readable(list.clone(), &mut reported);
        assert_eq!(read.iter().map(|n| n.metadata.name.as_deref()).collect::<Vec<_>>(), [Some("good")]);
        assert!(list.iter().all(|node| reported.first_failure(node).is_none()), "each is reported once");
        assert_eq!(readable(Vec::new(), &mut reported).len(), 0);
        assert_eq!(
            list.iter().filter_map(|node| reported.first_failure(node)).count(),
            2,
            "and again when it reappears"
        );
        let mut reported = UnreadableLog::new("GatewayNode");
        let names: Vec<String> =
            list.iter().filter(|node| reported.first_failure(node).is_some()).map(ResourceExt::name_any).collect();
        assert_eq!(names, ["bad", "worse"]);
    }
}
