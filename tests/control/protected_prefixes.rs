//! Tests of prefixes that must not be routed into the tunnel, and of prefixes that a CNI assigns.

use anyhow::{Context, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, PostParams};
use kube::discovery::ApiResource;
use raven_api::LABEL_GATEWAY;
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{Fixture, SOON, elects, has_condition, nodes, run, status};

const CRD: &str = "blockaffinities.crd.projectcalico.org";

#[tokio::test(flavor = "multi_thread")]
async fn protected_prefixes_are_rejected_without_side_effects() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        fixture.put_node("nobodys", 9, &[]).await?;
        let mut arguments = vec!["--auto-gateways=false", "--service-cidr=10.111.0.0/16"];
        if !has_service_cidrs(fixture) {
            arguments.extend(["--service-cidr=10.96.0.0/16", "--service-cidr=fd00:96::/112"]);
        }
        let _controller = fixture.controller("one", &arguments).await?;
        fixture.two_pools_are_ready().await?;
        let cloud = fixture.raw("cloud").await?;
        let own = ["10.244.3.0/24", "fd00:244:3::/64"];

        // Includes addresses that the API server publishes: its own (EndpointSlice) and, from Kubernetes 1.33 on, the
        // Service ranges (ServiceCIDRs).
        let refused = [
            ("0.0.0.0/0", "is the whole address space"),
            ("::/0", "is the whole address space"),
            ("127.0.0.0/8", "127.0.0.0/8 (loopback"),
            ("169.254.0.0/16", "169.254.0.0/16 (link-local"),
            ("224.0.0.0/4", "224.0.0.0/4 (multicast"),
            ("10.0.0.0/24", "overlaps 10.0.0.5/32 (the API server's address)"),
            ("10.96.7.0/24", "overlaps 10.96.0.0/16 (the range of Service addresses"),
            ("fd00:96::/64", "overlaps fd00:96::/112 (the range of Service addresses"),
            ("10.111.0.0/24", "overlaps 10.111.0.0/16 (the range of Service addresses"),
            ("10.1.0.1/32", "overlaps 10.1.0.1/32 (address of node c-a in Gateway cloud)"),
            ("10.1.0.9/32", "overlaps 10.1.0.9/32 (address of node nobodys, which is in no pool)"),
            ("198.51.100.0/24", "overlaps 198.51.100.10/32 (publicIP of node c-a in Gateway cloud, at which peers reach its tunnel)"),
        ];
        for (prefix, part) in refused {
            fixture.put_extra_prefixes("site", prefix).await?;
            let rejected = fixture
                .until("site", &format!("does not get {prefix}"), |g| has_condition(g, "Accepted", "False", "PrefixProtected", part))
                .await?;
            assert_eq!(status(&rejected).nodes[1].subnets, own, "the status must not contain {prefix}");
            elects(&rejected, &["x-b"])?;
            has_condition(&rejected, "Ready", "True", "Degraded", part)?;
            assert_eq!(fixture.event("site", "PrefixProtected", part).await?, "Warning");
        }
        // The site's own LAN with its nodes is the purpose of the annotation. Also, rejections are not permanent.
        fixture.put_extra_prefixes("site", "10.1.0.2/31, 192.168.7.0/24").await?;
        let taken = fixture.until("site", "gets its LAN", |g| has_condition(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(status(&taken).nodes[1].subnets, [&own[..], &["10.1.0.2/31", "192.168.7.0/24"]].concat());

        // A podCIDR is rejected too; the node stays in the pool without it.
        let api_server_in_it = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "x-c", "labels": {LABEL_GATEWAY: "site"}},
            "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}});
        fixture.nodes().create(&PostParams::default(), &serde_json::from_value(api_server_in_it)?).await?;
        fixture.put_node_status("x-c", "a-person", json!({"addresses": [{"type": "InternalIP", "address": "10.1.0.4"}]})).await?;
        let part = "podCIDR 10.0.0.0/24 of node x-c overlaps 10.0.0.5/32 (the API server's address)";
        let rejected = fixture
            .until("site", "does not get the podCIDR", |g| {
                // The Node's address is written after the Node itself.
                ensure!(nodes(g) == ["x-a", "x-b", "x-c"], "the nodes are {:?}", nodes(g));
                has_condition(g, "Accepted", "False", "PrefixProtected", part)
            })
            .await?;
        assert_eq!(status(&rejected).nodes[2].subnets, Vec::<String>::new());

        // A node whose InternalIP is in another pool's pod prefix gets no part of that prefix.
        fixture.put_node_status("x-c", "a-person", json!({"addresses": [{"type": "InternalIP", "address": "10.244.1.66"}]})).await?;
        let part = "InternalIP 10.244.1.66 of node x-c lies in 10.244.1.0/24 of node c-a in Gateway cloud";
        fixture.until("site", "has a node in the cloud's pods", |g| has_condition(g, "Accepted", "False", "PrefixProtected", part)).await?;

        // A node without an address cannot be elected, whether listed or not.
        let spec = crate::fixture::site(&["x-d", "x-b"]);
        fixture.put_node("x-d", 8, &[(LABEL_GATEWAY, "site")]).await?;
        fixture.put_node_status("x-d", "a-person", json!({"addresses": [{"type": "Hostname", "address": "x-d"}]})).await?;
        fixture.put_gateway("site", spec).await?;
        let rejected = fixture
            .until("site", "has a listed node without an address", |g| {
                has_condition(g, "Accepted", "False", "EndpointNodeUnaddressed", "node x-d")
            })
            .await?;
        elects(&rejected, &["x-b"])?;

        fixture.fence().await?;
        assert_eq!(fixture.raw("cloud").await?, cloud, "the other Gateway must not change");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calico_blocks_become_pool_prefixes() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;
        let cloud = fixture.raw("cloud").await?;

        install_calico(fixture).await?;
        let blocks: Api<DynamicObject> = Api::all_with(fixture.lab.cluster().client(), &affinities());
        for (node, cidr, state) in [
            ("x-a", "10.50.0.64/26", "confirmed"),
            ("x-a", "10.50.0.0/26", "confirmed"),
            ("x-b", "10.50.1.0/26", "pending"),
        ] {
            put_block(&blocks, node, cidr, state).await?;
        }
        subnets_become(fixture, "x-a", &["10.50.0.0/26", "10.50.0.64/26"]).await?;
        subnets_become(fixture, "x-b", &["10.244.3.0/24", "fd00:244:3::/64"]).await?;

        // A block claimed by two nodes is reported, like any contested prefix.
        put_block(&blocks, "x-b", "10.50.0.64/27", "confirmed").await?;
        let part = "Calico block 10.50.0.64/27 of node x-b overlaps 10.50.0.64/26 of node x-a in Gateway site";
        fixture
            .until("site", "has two nodes with one block", |g| {
                has_condition(g, "Accepted", "False", "PrefixClaimedTwice", part)
            })
            .await?;
        blocks.delete("x-b-10-50-0-64-27", &DeleteParams::default()).await?;

        // Calico moves a block: it is confirmed on another node after it was released.
        blocks.delete("x-a-10-50-0-64-26", &DeleteParams::default()).await?;
        put_block(&blocks, "x-b", "10.50.0.64/26", "confirmed").await?;
        subnets_become(fixture, "x-a", &["10.50.0.0/26"]).await?;
        subnets_become(fixture, "x-b", &["10.50.0.64/26"]).await?;
        fixture.until("site", "is accepted", |g| has_condition(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(fixture.raw("cloud").await?, cloud, "the other Gateway must not change");

        // Calico is uninstalled.
        let crds: Api<CustomResourceDefinition> = Api::all(fixture.lab.cluster().client());
        crds.delete(CRD, &DeleteParams::default()).await?;
        subnets_become(fixture, "x-a", &["10.244.2.0/24", "fd00:244:2::/64"]).await
    })
    .await;
}

async fn subnets_become(fixture: &Fixture, node: &str, expected: &[&str]) -> Result<()> {
    let check = |gateway: &raven_api::Gateway| {
        let status = status(gateway);
        let found = status.nodes.iter().find(|n| n.node_name == node).context("the node is not in the pool")?;
        ensure!(found.subnets == expected, "{:?}", found.subnets);
        Ok(())
    };
    fixture.until("site", &format!("has {expected:?} at {node}"), check).await.map(drop)
}

fn affinities() -> ApiResource {
    ApiResource {
        group: "crd.projectcalico.org".to_owned(),
        version: "v1".to_owned(),
        api_version: "crd.projectcalico.org/v1".to_owned(),
        kind: "BlockAffinity".to_owned(),
        plural: "blockaffinities".to_owned(),
    }
}

// The schema of Calico's CRD: all four fields are required, and `deleted` is a string.
async fn install_calico(fixture: &Fixture) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(fixture.lab.cluster().client());
    let text = json!({"type": "string"});
    let spec = json!({"type": "object", "required": ["cidr", "deleted", "node", "state"], "properties": {"cidr": text, "deleted": text, "node": text, "state": text}});
    let schema = json!({"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}});
    let crd = serde_json::from_value(json!({
        "metadata": {"name": CRD},
        "spec": {
            "group": "crd.projectcalico.org",
            "scope": "Cluster",
            "names": {"kind": "BlockAffinity", "plural": "blockaffinities"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
        },
    }))?;
    crds.create(&PostParams::default(), &crd).await.map(drop).context("create the CRD")
}

async fn put_block(blocks: &Api<DynamicObject>, node: &str, cidr: &str, state: &str) -> Result<()> {
    let name = format!("{node}-{}", cidr.replace(['.', '/'], "-"));
    let spec = json!({"node": node, "cidr": cidr, "state": state, "deleted": "false"});
    let block = DynamicObject::new(&name, &affinities()).data(json!({ "spec": spec }));
    eventually(SOON, "the API server accepts BlockAffinities", async || {
        Ok(blocks.create(&PostParams::default(), &block).await.map(drop)?)
    })
    .await
}

fn has_service_cidrs(fixture: &Fixture) -> bool {
    fixture.lab.cluster().kubectl(&["get", "servicecidrs"]).is_ok()
}
