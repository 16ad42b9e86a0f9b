//! Tests of the objects that direct clients to gateway nodes: the internal Service, the hosts file and load balancers.

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use raven_api::LABEL_GATEWAY;
use raven_api::proxy::{DNS_CONFIG_MAP, DNS_KEY, INTERNAL_SERVICE};
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{SOON, run};

#[tokio::test(flavor = "multi_thread")]
async fn load_balancers_are_created_and_their_addresses_published() {
    run(test_name!(), async |fixture| {
        let client = fixture.lab.cluster().client();
        let services: Api<Service> = Api::namespaced(client.clone(), "kube-system");
        let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "kube-system");
        fixture.put_node("c-a", 1, &[(LABEL_GATEWAY, "cloud")]).await?;
        fixture.put_node("x-a", 2, &[(LABEL_GATEWAY, "site"), ("openyurt.io/is-edge-worker", "true")]).await?;
        let apply = async |name: &str, spec: serde_json::Value| {
            let gateway = json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": {"name": name}, "spec": spec});
            fixture.gateways.patch(name, &PatchParams::apply("a-person"), &Patch::Apply(&gateway)).await.map(drop)
        };
        apply("cloud", json!({"exposeType": "LoadBalancer", "proxyConfig": {"proxyHTTPSPort": "10250,9443"}})).await?;
        apply("site", json!({"endpoints": [{"nodeName": "x-a", "type": "tunnel", "underNAT": true}]})).await?;
        // Endpoints as left behind by upstream's Raven.
        let left: Api<Endpoints> = Api::namespaced(client.clone(), "kube-system");
        let addresses = json!([{"addresses": [{"ip": "10.1.0.9"}], "ports": [{"name": "https-10250", "port": 10263}]}]);
        let object = serde_json::from_value(json!({"metadata": {"name": INTERNAL_SERVICE}, "subsets": addresses}))?;
        left.create(&PostParams::default(), &object).await?;
        let _controller = fixture.controller("one", &[]).await?;

        let balancers = ListParams::default().labels("raven.openyurt.io/gateway-type");
        let two = eventually(SOON, "a load balancer for the proxy and one for the tunnel exist", async || {
            let found = services.list(&balancers).await?.items;
            ensure!(found.len() == 2, "there are {} load balancers", found.len());
            Ok(found)
        })
        .await?;
        for service in &two {
            let (name, spec) = (
                service.metadata.name.clone().context("the Service has no name")?,
                service.spec.clone().context("the Service has no spec")?,
            );
            assert_eq!((spec.type_.as_deref(), spec.external_traffic_policy.as_deref()), (Some("LoadBalancer"), Some("Local")), "{name}");
            let port = spec.ports.iter().flatten().next().context("the Service has no port")?;
            let proxy = name.starts_with("x-raven-proxy-svc-cloud-");
            assert_eq!((port.port, port.protocol.as_deref()), if proxy { (10262, Some("TCP")) } else { (4500, Some("UDP")) }, "{name}");
            let slice = eventually(SOON, "the Service has an EndpointSlice", async || Ok(slices.get(&name).await?)).await?;
            assert_eq!(slice.endpoints[0].addresses, ["10.1.0.1"]);
            let ingress = if proxy { json!([{"ip": "203.0.113.7"}]) } else { json!([{"hostname": "lb.example", "ip": "203.0.113.8"}]) };
            let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
            services.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
        }
        fixture
            .until("cloud", "has the load balancers' addresses", |g| {
                let active = json!(g.status)["activeEndpoints"].clone();
                ensure!(active[0]["publicIP"] == "203.0.113.8" && active[1]["publicIP"] == "203.0.113.7", "{active}");
                Ok(())
            })
            .await?;

        // Names of edge nodes resolve to the internal Service, those of cloud nodes to their own address.
        let maps: Api<ConfigMap> = Api::namespaced(client, "kube-system");
        eventually(SOON, "the hosts file is complete", async || {
            let service = services.get(INTERNAL_SERVICE).await?.spec.context("the Service has no spec")?;
            let ports: Vec<i32> = service.ports.iter().flatten().map(|p| p.port).collect();
            ensure!(ports == [10255, 9443, 10250], "{ports:?}");
            let ip = service.cluster_ip.context("the Service has no address")?;
            let hosts =
                maps.get(DNS_CONFIG_MAP).await?.data.and_then(|mut d| d.remove(DNS_KEY)).context("the ConfigMap has no hosts file yet")?;
            ensure!(hosts == format!("10.1.0.1\tc-a\n{ip}\tx-a\n"), "the hosts file is {hosts:?}");
            Ok(())
        })
        .await?;

        // Objects that are no longer needed are deleted.
        eventually(SOON, "upstream's Endpoints are deleted", async || {
            ensure!(left.get_opt(INTERNAL_SERVICE).await?.is_none(), "the Endpoints still exist");
            Ok(())
        })
        .await?;
        fixture.gateways.delete("cloud", &DeleteParams::default()).await?;
        eventually(SOON, "the load balancers are deleted", async || {
            let left = services.list(&balancers).await?.items.len();
            ensure!(left == 0, "{left} load balancers are left");
            Ok(())
        })
        .await
    })
    .await;
}
