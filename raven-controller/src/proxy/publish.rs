//! Writes what [`services`](super::services) and [`dns`](super::dns) say, and takes away what they do not say any more.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{ConfigMap, Endpoints, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use raven_api::{
    MANAGER_CONTROLLER,
    proxy::{DNS_CONFIG_MAP, DNS_KEY, INTERNAL_SERVICE},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::interval;

use super::{
    dns,
    follow::{Changes, Cluster},
    services::{self, LABEL_MANAGED_BY},
};
use crate::lead::Mandate;

/// Everything is written again now and then: somebody else may have changed it.
const REFRESH: Duration = Duration::from_secs(300);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(3);

/// Why something could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source} (does RBAC allow it? see deploy/rbac.yaml)")]
struct Error {
    what: String,
    source: Box<kube::Error>,
}

fn error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error { what, source: Box::new(source) }
}

/// Publishes.
pub struct Publisher {
    client: Client,
    namespace: String,
    cluster: Cluster,
    changes: Changes,
    mandate: Mandate,
    /// What was written, by kind and name.
    written: BTreeMap<(&'static str, String), Value>,
}

impl Publisher {
    /// A publisher that has written nothing yet.
    pub fn new(client: Client, namespace: String, cluster: Cluster, changes: Changes, mandate: Mandate) -> Self {
        Self { client, namespace, cluster, changes, mandate, written: BTreeMap::new() }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let (mut refresh, mut again) = (interval(REFRESH), interval(AGAIN));
        let mut failed = true;
        loop {
            tokio::select! {
                () = self.changes.next() => {}
                changed = self.mandate.leads.changed() => {
                    if changed.is_err() { return }
                    self.written.clear();
                }
                _ = refresh.tick() => self.written.clear(),
                _ = again.tick(), if failed => {}
            }
            failed = !self.mandate.holds() || !self.cluster.complete();
            if !failed && let Err(e) = self.publish().await {
                tracing::warn!("{e}");
                failed = true;
            }
        }
    }

    /// Each object stands alone: one that is refused (a quota, somebody's policy) keeps no other from being written. The first is told.
    async fn publish(&mut self) -> Result<(), Error> {
        let l7 = self.cluster.l7();
        let gateways = self.cluster.gateways();
        let objects = services::desired(&self.namespace, &gateways, &self.cluster.gateway_nodes(), l7);
        let services = self.apply::<Service>("Service", &objects.services).await;
        let slices = self.apply::<EndpointSlice>("EndpointSlice", &objects.slices).await;
        let service = if l7 { self.cluster.service() } else { Vec::new() };
        let hosts = dns::hosts(&self.cluster.nodes(), &gateways, &service);
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": DNS_CONFIG_MAP }, "data": { DNS_KEY: hosts } });
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let hosts = self.put(&api, "ConfigMap", DNS_CONFIG_MAP, &map).await;
        services.and(slices).and(hosts).and(self.forget_upstream().await)
    }

    /// Upstream's Raven has Endpoints of the Service's name, which nobody owns: after a switch they stay, and Kubernetes mirrors them into
    /// a slice beside ours, of nodes that were elected then. Once is enough; and once more with everything else.
    async fn forget_upstream(&mut self) -> Result<(), Error> {
        let (kind, name) = ("Endpoints", INTERNAL_SERVICE.to_owned());
        if !self.written.contains_key(&(kind, name.clone())) {
            let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &self.namespace);
            self.delete(&api, kind, &name).await?;
            self.written.insert((kind, name), Value::Null);
        }
        Ok(())
    }

    /// Writes all of a kind, and deletes what carries our label besides.
    async fn apply<K>(&mut self, kind: &'static str, objects: &BTreeMap<String, Value>) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        let ours = ListParams::default().labels(&format!("{LABEL_MANAGED_BY}={MANAGER_CONTROLLER}"));
        let listed = api.list(&ours).await.map_err(error(format!("list {kind}s")));
        let present: BTreeSet<String> = listed.iter().flatten().map(ResourceExt::name_any).collect();
        if listed.is_ok() {
            // What somebody deleted is written again.
            self.written.retain(|(of, name), _| *of != kind || present.contains(name));
        }
        let mut outcome = listed.map(drop);
        for (name, object) in objects {
            outcome = outcome.and(self.put(&api, kind, name, object).await);
        }
        for name in present.iter().filter(|name| !objects.contains_key(*name)) {
            outcome = outcome.and(self.delete(&api, kind, name).await);
        }
        outcome
    }

    async fn delete<K>(&mut self, api: &Api<K>, kind: &'static str, name: &str) -> Result<(), Error>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => tracing::info!(kind, name, "deleted: nobody needs it any more"),
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(e) => return Err(error(format!("delete {kind} {name}"))(e)),
        }
        self.written.remove(&(kind, name.to_owned()));
        Ok(())
    }

    async fn put<K>(&mut self, api: &Api<K>, kind: &'static str, name: &str, object: &Value) -> Result<(), Error>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        let key = (kind, name.to_owned());
        if self.written.get(&key) == Some(object) {
            return Ok(());
        }
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        api.patch(name, &params, &Patch::Apply(object)).await.map_err(error(format!("apply {kind} {name}")))?;
        tracing::info!(kind, name, "written");
        self.written.insert(key, object.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fake_api::{FakeApi, list},
        lead::Elector,
        proxy::follow::follow,
    };

    const SERVICES: &str = "/api/v1/namespaces/kube-system/services";
    const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices";
    const HOSTS: &str = "PATCH /api/v1/namespaces/kube-system/configmaps/edge-tunnel-nodes";

    /// A cluster with one cloud node behind a load balancer; `special` says what is not answered by success.
    async fn publisher(special: impl Fn(&str) -> Option<Result<String, u16>> + Send + Sync + 'static) -> (FakeApi, Publisher) {
        let api = FakeApi::serve(move |asked| {
            special(asked).unwrap_or_else(|| {
                Ok(match asked {
                    "GET /apis/raven.openyurt.io/v1beta1/gateways" => list(&[
                        r#"{"metadata":{"name":"cloud"},"spec":{"exposeType":"LoadBalancer"},"status":{"nodes":[{"nodeName":"a","privateIP":"10.0.0.1"}],
                            "activeEndpoints":[{"nodeName":"a","type":"proxy"}]}}"#,
                    ]),
                    "GET /apis/raven.openyurt.io/v1beta1/gatewaynodes" => {
                        list(&[r#"{"metadata":{"name":"a"},"spec":{},"status":{"proxy":{"ready":true}}}"#])
                    }
                    _ if asked.starts_with("GET") => list(&[]),
                    _ => "{}".to_owned(),
                })
            })
        })
        .await;
        let (cluster, mut changes) = follow(api.client.clone(), "kube-system");
        while !cluster.complete() {
            changes.next().await;
        }
        api.asked();
        let (_, mandate) = Elector::new(api.client.clone(), "kube-system", "lease", "me");
        let publisher = Publisher::new(api.client.clone(), "kube-system".to_owned(), cluster, changes, mandate);
        (api, publisher)
    }

    #[tokio::test]
    async fn one_object_that_is_refused_keeps_no_other_from_being_written() {
        let balancer = services::balancer_name("x-raven-proxy-svc", "cloud", "a");
        for refused in
            [format!("PATCH {SERVICES}/{balancer}"), format!("PATCH {SERVICES}/x-raven-proxy-internal-svc"), format!("GET {SLICES}")]
        {
            let no = refused.clone();
            let (api, mut publisher) = publisher(move |asked| (asked == no).then_some(Err(403))).await;
            let error = publisher.publish().await.expect_err("it is told").to_string();
            let what = refused.rsplit('/').next().expect("a last part");
            assert!(error.to_lowercase().contains(what), "{error}");
            let asked = api.asked();
            let written = |what: &str| asked.iter().any(|asked| asked == what);
            assert!(written(&format!("PATCH {SERVICES}/{balancer}")) && written(&format!("PATCH {SLICES}/{balancer}")), "{asked:?}");
            assert!(written(&format!("PATCH {SERVICES}/x-raven-proxy-internal-svc")), "{asked:?}");
            assert!(written(&format!("PATCH {SLICES}/x-raven-proxy-internal-svc-a")) && written(HOSTS), "{asked:?}");
        }
    }

    #[tokio::test]
    async fn what_somebody_deleted_is_put_back_and_what_is_there_is_left_alone() {
        let there = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let present = there.clone();
        let (api, mut publisher) = publisher(move |asked| {
            let present = present.lock().expect("no test holds it");
            let items: Vec<String> = present.iter().map(|name| format!(r#"{{"metadata":{{"name":"{name}"}}}}"#)).collect();
            (asked == format!("GET {SERVICES}")).then(|| Ok(list(&items.iter().map(String::as_str).collect::<Vec<_>>())))
        })
        .await;
        publisher.publish().await.expect("written");
        let balancer = services::balancer_name("x-raven-proxy-svc", "cloud", "a");
        let written =
            |api: &FakeApi| api.asked().into_iter().filter(|asked| asked.starts_with(&format!("PATCH {SERVICES}"))).collect::<Vec<_>>();
        assert_eq!(written(&api).len(), 2);
        there.lock().expect("no test holds it").extend(["x-raven-proxy-internal-svc".to_owned(), balancer.clone()]);
        publisher.publish().await.expect("nothing to do");
        assert_eq!(written(&api), Vec::<String>::new());
        there.lock().expect("no test holds it").pop();
        publisher.publish().await.expect("written");
        assert_eq!(written(&api), [format!("PATCH {SERVICES}/{balancer}")]);
    }

    #[tokio::test]
    async fn endpoints_that_upstream_left_behind_go_once() {
        const ENDPOINTS: &str = "DELETE /api/v1/namespaces/kube-system/endpoints/x-raven-proxy-internal-svc";
        let (api, mut publisher) = publisher(|_| None).await;
        let asked = |api: &FakeApi| api.asked().iter().filter(|asked| *asked == ENDPOINTS).count();
        publisher.publish().await.expect("written");
        publisher.publish().await.expect("written");
        assert_eq!(asked(&api), 1);
        let (_api, mut publisher) = self::publisher(|asked| (asked == ENDPOINTS).then_some(Err(404))).await;
        publisher.publish().await.expect("there are none");
    }
}
