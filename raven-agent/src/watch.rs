//! Watches Gateways, three ConfigMaps, the API server's EndpointSlice and the node's own GatewayNode, and publishes the
//! latest [`Inputs`] once all lists are complete. Bursts of events are coalesced.
//!
//! Nodes, Pods and other nodes' GatewayNodes, which change often, are never watched: ten thousand agents must cost the API
//! server little, and a site on a metered link must not pay for the activity of other sites.

mod outages;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::IpAddr,
    sync::Arc,
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
    core::PartialObjectMeta,
    runtime::{WatchStreamExt, reflector, watcher},
};
use raven_api::{
    Gateway, GatewayNode,
    guarded::{Guarded, UnreadableLog},
    names::{AGENT_CONFIG_MAP, API_SERVER_NAMESPACE, API_SERVER_SLICE, SWITCHES_CONFIG_MAP},
    proxy::{CA_KEY, CA_NAME},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    snapshot,
    topology::{ClusterSettings, Inputs, keep_keys},
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

/// Bookmarks would be most of what a quiet cluster sends. All Gateways are watched, so the version of the last one is recent
/// enough to continue a watch, unless the API server has restarted; a list of one object costs as little as a bookmark.
fn all() -> watcher::Config {
    watcher::Config::default().disable_bookmarks()
}

fn named(name: &str) -> watcher::Config {
    all().fields(&format!("metadata.name={name}"))
}

/// Records whether the GatewayNode of this node exists, until the process ends. The object changes often, and this agent
/// knows its content, so the API server sends only its metadata.
pub async fn run_own(client: Client, node: &str, exists: watch::Sender<Option<bool>>) {
    // Its outages do not count: if the object is deleted meanwhile, it is created again a little later.
    let api = Api::<PartialObjectMeta<GatewayNode>>::all(client);
    let (own, mut events) = reflected("own GatewayNode", api, named(node), strip, &Outages::default());
    while events.next().await.is_some() {
        exists.send_replace(Some(!own.is_empty()));
    }
}

/// Runs until the process ends. The last inputs stay valid while the API server is unavailable; `outages` records how
/// long that has been.
pub async fn run(client: Client, namespace: &str, latest: watch::Sender<Option<Arc<Inputs>>>, outages: Outages) {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), API_SERVER_NAMESPACE);
    // Gateways may be older than Raven's CRD, which would have refused them.
    let (gateways, a) = reflected("Gateways", Api::<Guarded<Gateway>>::all(client), all(), lean, &outages);
    let (switches, b) = reflected(SWITCHES_CONFIG_MAP, configs.clone(), named(SWITCHES_CONFIG_MAP), strip, &outages);
    let (agent, c) = reflected(AGENT_CONFIG_MAP, configs.clone(), named(AGENT_CONFIG_MAP), strip, &outages);
    let (ca, d) = reflected(CA_NAME, configs, named(CA_NAME), strip, &outages);
    // Its outages do not count, because the agent works without it.
    let (api_servers, e) = reflected(API_SERVERS, slices, named(API_SERVER_SLICE), strip, &Outages::default());
    let mut log = UnreadableLog::of_gateways();
    let mut incomplete = vec!["Gateways", SWITCHES_CONFIG_MAP, AGENT_CONFIG_MAP, CA_NAME];
    let mut events = stream::select_all([a, b, c, d, e]);
    while let Some(progress) = events.next().await {
        incomplete.retain(|list| Some(*list) != progress);
        if !incomplete.is_empty() {
            continue;
        }
        // A burst (a roll-out, a list after an outage) is one change until it pauses or reaches its maximum length:
        // every change rebuilds the whole topology.
        let end = Instant::now() + BURST;
        while let Ok(Some(_)) = timeout_at(end.min(Instant::now() + SETTLE), events.next()).await {}
        let data = |store: &reflector::Store<ConfigMap>| {
            store.state().first().and_then(|c| c.data.clone()).unwrap_or_default()
        };
        let gateways = readable(&gateways.state(), latest.borrow().as_deref(), &mut log);
        let inputs = snapshot::lean(Inputs {
            api_servers: api_servers.state().iter().flat_map(|slice| addresses(slice)).collect(),
            gateways,
            gateway_nodes: Vec::new(),
            settings: ClusterSettings::parse(&data(&switches), &data(&agent)),
            proxy_ca: data(&ca).remove(CA_KEY).unwrap_or_default(),
            resolved: BTreeMap::new(),
        });
        latest.send_if_modified(|have| {
            let mut inputs = inputs;
            if let Some(before) = have.as_ref() {
                keep_keys(&mut inputs, before);
                inputs.resolved.clone_from(&before.resolved);
            }
            let changed = have.as_deref() != Some(&inputs);
            if changed {
                *have = Some(Arc::new(inputs));
            }
            changed
        });
    }
}

/// The Gateways, with the last known version of those that are unreadable. Each of these is logged once.
fn readable(objects: &[Arc<Guarded<Gateway>>], before: Option<&Inputs>, log: &mut UnreadableLog) -> Vec<Gateway> {
    let known = |name: &str| before?.gateways.iter().find(|gateway| gateway.name_any() == name).cloned();
    log.retain(objects.iter().map(Arc::as_ref));
    let version = |object: &Arc<Guarded<Gateway>>| {
        let name = object.name_any();
        if let Some(error) = log.first_failure(object) {
            tracing::warn!(kind = log.kind(), name, error, "object is unreadable; {}", log.advice());
        }
        object.0.as_ref().ok().cloned().or_else(|| known(&name))
    };
    objects.iter().filter_map(version).collect()
}

fn lean(object: &mut Guarded<Gateway>) {
    if let Ok(gateway) = &mut object.0 {
        snapshot::lean_gateway(gateway);
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<IpAddr> {
    slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse().ok()).collect()
}

/// Removes what nothing here uses and is most of an object.
fn strip<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    (metadata.managed_fields, metadata.annotations) = (None, None);
}

/// `strip`: removes parts of each object before it is stored.
fn reflected<K>(
    what: &'static str,
    api: Api<K>,
    config: watcher::Config,
    strip: fn(&mut K),
    outages: &Outages,
) -> (reflector::Store<K>, BoxStream<'static, Progress>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let outages = outages.clone();
    let events = watcher(api, config)
        .default_backoff()
        .modify(strip)
        .reflect(writer)
        .inspect_err(move |e| {
            // Without bookmarks, the version of an object that never changes becomes too old, and the list is read again.
            if matches!(e, watcher::Error::WatchError(status) if status.code == 410) {
                return tracing::debug!(list = what, "the watch begins again with a list");
            }
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
    use raven_api::guarded::Unreadable;

    use super::*;

    #[test]
    fn last_known_version_of_an_unreadable_gateway_stays_in_use() {
        let gateway = |name: &str, node: &str| {
            let mut gateway = Gateway::new(name, raven_api::GatewaySpec::default());
            gateway.spec.endpoints =
                vec![raven_api::gateway::Endpoint { node_name: node.to_owned(), ..Default::default() }];
            gateway
        };
        let unreadable = |name: &str| {
            let metadata = gateway(name, "").metadata;
            Arc::new(Guarded(Err(Unreadable { error: "missing field `spec`".to_owned(), metadata })))
        };
        let before = Inputs { gateways: vec![gateway("a", "old"), gateway("b", "old")], ..Inputs::default() };
        let objects = [unreadable("a"), Arc::new(Guarded(Ok(gateway("b", "new")))), unreadable("c")];
        let mut log = UnreadableLog::of_gateways();
        let mut read = |before| readable(&objects, before, &mut log);
        let nodes = |gateways: Vec<Gateway>| -> Vec<(String, String)> {
            gateways.into_iter().map(|g| (g.name_any(), g.spec.endpoints[0].node_name.clone())).collect()
        };
        let pair = |name: &str, node: &str| (name.to_owned(), node.to_owned());
        assert_eq!(nodes(read(Some(&before))), [pair("a", "old"), pair("b", "new")]);
        assert_eq!(nodes(read(None)), [pair("b", "new")]);
    }
}
