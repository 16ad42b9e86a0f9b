//! Tests of the conversion between the two versions of the Gateway by the API server and the webhook.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use raven_api::LABEL_GATEWAY;
use raven_api::conversion::{ANNOTATION_SPEC, ANNOTATION_STATUS};
use raven_api::schema::GATEWAY_CRD;
use raven_tests::agent::WEBHOOK;
use raven_tests::{eventually, test_name};
use serde_json::{Value, json};

use crate::fixture::{Fixture, SOON, run};

const OLD: &str = "gateways.v1alpha1.raven.openyurt.io";
const NEW: &str = "gateways.v1beta1.raven.openyurt.io";
/// An example of OpenYurt's documentation for v1alpha1.
const UPSTREAM: &str = "
apiVersion: raven.openyurt.io/v1alpha1
kind: Gateway
metadata:
  name: gw-hangzhou
spec:
  nodeSelector:
    matchLabels:
      raven.openyurt.io/gateway: gw-hangzhou
  endpoints:
  - nodeName: h-a
    underNAT: true
  - nodeName: h-b
    underNAT: true
";

#[tokio::test(flavor = "multi_thread")]
async fn conversion_between_versions_is_lossless() {
    run(test_name!(), async |fixture| {
        // A v1beta1 Gateway with all fields.
        let full = json!({
            "nodeSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "k", "operator": "In", "values": ["x", "y"]}]},
            "exposeType": "PublicIP",
            "proxyConfig": {"Replicas": 1, "proxyHTTPPort": "10255,9445", "proxyHTTPSPort": "10250"},
            "tunnelConfig": {"Replicas": 2},
            "endpoints": [
                {"nodeName": "c-a", "type": "tunnel", "port": 4501, "publicPort": 14501, "publicIP": "198.51.100.10", "underNAT": false, "natType": "x", "config": {"publicKey": "k"}},
                {"nodeName": "c-a", "type": "proxy", "port": 10263, "underNAT": false},
            ],
        });
        // Without the webhook, requests for the old version fail instead of losing fields.
        fixture.put_gateway("full", full.clone()).await?;
        let error = kubectl(fixture, &["get", OLD, "full"]).expect_err("no webhook converts yet");
        ensure!(format!("{error:?}").contains("conversion webhook for raven.openyurt.io"), "{error:?}");

        fixture.put_two_pools().await?;
        fixture.put_node("h-a", 4, &[(LABEL_GATEWAY, "gw-hangzhou")]).await?;
        let _controller = fixture.controller("one", &WEBHOOK).await?;
        old_is_served(fixture).await?;
        fixture.two_pools_are_ready().await?;
        fixture.until("full", "has conditions", |g| crate::fixture::has_condition(g, "Accepted", "False", "EndpointNodeUnknown", "")).await?;

        for name in ["full", "cloud", "site"] {
            let before = fixture.gateways.get(name).await?;
            let old = get(fixture, OLD, name)?;
            assert_eq!(old["apiVersion"], "raven.openyurt.io/v1alpha1");
            assert_eq!(old["spec"]["endpoints"][0].as_object().map(|e| e.contains_key("port")), Some(false), "the object has the old schema");
            // An old client reads the object and writes it back unchanged, once by update and once by apply.
            kubectl(fixture, &["replace", "-f", &file(fixture, "old", &old.to_string())?])?;
            let mut applied = old.clone();
            applied["metadata"] = json!({"name": name, "annotations": old["metadata"]["annotations"]});
            applied["status"].take();
            kubectl(fixture, &["apply", "--server-side", "--force-conflicts", "-f", &file(fixture, "old", &applied.to_string())?])?;
            let after = fixture.gateways.get(name).await?;
            assert_eq!((&after.spec, &after.status), (&before.spec, &before.status), "{name}");
            let annotations = after.metadata.annotations.unwrap_or_default();
            assert!(!annotations.contains_key(ANNOTATION_SPEC) && !annotations.contains_key(ANNOTATION_STATUS), "{annotations:?}");
        }
        assert_eq!(get(fixture, NEW, "full")?["spec"], full);

        // A user who works with the old version only.
        for apply in [&["apply", "--server-side"][..], &["apply", "--server-side=false"]] {
            kubectl(fixture, &[apply, &["-f", &file(fixture, "upstream", UPSTREAM)?]].concat())?;
            let new = get(fixture, NEW, "gw-hangzhou")?;
            let endpoint = |node: &str| json!({"nodeName": node, "type": "tunnel", "port": 4500, "underNAT": true});
            assert_eq!(new["spec"]["endpoints"], json!([endpoint("h-a"), endpoint("h-b")]));
            assert_eq!((&new["spec"]["proxyConfig"]["Replicas"], &new["spec"]["tunnelConfig"]["Replicas"]), (&json!(1), &json!(1)));
            eventually(SOON, "the old version shows the elected node", async || {
                let old = get(fixture, OLD, "gw-hangzhou")?;
                ensure!(old["status"]["activeEndpoint"]["nodeName"] == "h-a", "{}", old["status"]);
                ensure!(old["status"]["nodes"][0]["subnets"][0] == "10.244.4.0/24", "{}", old["status"]);
                Ok(())
            })
            .await?;
            let line = kubectl(fixture, &["get", OLD, "gw-hangzhou", "--no-headers"])?;
            assert_eq!(line.split_whitespace().nth(1), Some("h-a"), "{line}");
            kubectl(fixture, &["delete", OLD, "gw-hangzhou"])?;
        }
        // A change by an old client is applied, and fields that the old version lacks are kept.
        let patch = json!({"spec": {"endpoints": [{"nodeName": "c-a", "underNAT": false, "publicIP": "198.51.100.20", "config": {"publicKey": "k"}}]}});
        kubectl(fixture, &["patch", OLD, "full", "--type=merge", "-p", &patch.to_string()])?;
        let mut expected = full.clone();
        expected["endpoints"] = json!([full["endpoints"][0]]);
        expected["endpoints"][0]["publicIP"] = json!("198.51.100.20");
        assert_eq!(get(fixture, NEW, "full")?["spec"], expected);

        let bad = UPSTREAM.replace("spec:", "spec:\n  exposeType: PublicIP");
        let error = kubectl(fixture, &["apply", "-f", &file(fixture, "bad", &bad)?]).expect_err("a Gateway behind NAT must not be exposed");
        ensure!(format!("{error:?}").contains("no endpoint of it may be underNAT"), "{error:?}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn webhook_survives_restarts_and_reapplied_manifests() {
    run(test_name!(), async |fixture| {
        // As installed: the API server calls the Service. Without a kube-proxy, its address is assigned
        // to the control plane.
        let service = kubectl(
            fixture,
            &["-n", "kube-system", "get", "service", "raven-controller-webhook", "-o", "jsonpath={.spec.clusterIP}"],
        )?;
        fixture.lab.control_plane.run("ip", &["address", "add", &format!("{service}/32"), "dev", "lo"])?;
        let at = |port: u16| format!("--webhook-bind-addr={service}:{port}");
        fixture.put_two_pools().await?;
        let mut one = fixture.controller("one", &[&at(443)]).await?;
        old_is_served(fixture).await?;
        fixture.two_pools_are_ready().await?;
        let ca = ca_bundle(fixture).await?;

        // Every replica serves the webhook; in this lab each one has its own port.
        let two = fixture.controller("two", &[&at(444)]).await?;
        let bundle = file(fixture, "ca", std::str::from_utf8(&ca)?)?;
        eventually(SOON, "the second replica serves the webhook", async || {
            let ns = &fixture.lab.control_plane;
            let to = format!("raven-controller-webhook.kube-system.svc:444:{service}:444");
            let url = "https://raven-controller-webhook.kube-system.svc:444/convert";
            let answer = ns.run("curl", &["-sS", "--noproxy", "*", "--cacert", &bundle, "--connect-to", &to, url])?;
            ensure!(answer.contains("post a ConversionReview"), "{answer}");
            Ok(())
        })
        .await?;
        drop(two);

        // The manifest is applied again in all usual ways: the CA stays or is restored.
        let crd = Path::new(env!("CARGO_MANIFEST_DIR"))
            .with_file_name("deploy")
            .join("crds")
            .join(format!("{GATEWAY_CRD}.yaml"));
        let crd = crd.to_string_lossy().into_owned();
        kubectl(fixture, &["apply", "--server-side", "--force-conflicts", "-f", &crd])?;
        old_is_served(fixture).await?;
        kubectl(fixture, &["apply", "-f", &crd])?;
        old_is_served(fixture).await?;
        kubectl(fixture, &["replace", "-f", &crd])?;
        old_is_served(fixture).await?;
        // Serving alone is no proof, because the API server may use a cached configuration.
        eventually(SOON, "the CRD has the same CA again", async || {
            ensure!(ca_bundle(fixture).await? == ca, "the CRD has another CA");
            Ok(())
        })
        .await?;

        // Without a webhook, the stored version can be read and written, and the error for the old
        // version names the webhook.
        one.kill()?;
        let error = kubectl(fixture, &["get", OLD, "site"]).expect_err("no webhook responds");
        ensure!(format!("{error:?}").contains("conversion webhook for raven.openyurt.io"), "{error:?}");
        assert_eq!(get(fixture, NEW, "site")?["metadata"]["name"], "site");
        fixture.put_gateway("site", crate::fixture::site(&["x-a"])).await?;
        fixture.put_gateway("new", json!({})).await?;
        kubectl(fixture, &["get", "gw"])?;
        kubectl(fixture, &["delete", "gw", "new"])?;

        // The next replica reuses the CA of the first one.
        let _three = fixture.controller("three", &[&at(443)]).await?;
        old_is_served(fixture).await?;
        assert_eq!(ca_bundle(fixture).await?, ca);

        // A user empties the Secret, as documented: the controller creates a new CA and updates the CRD.
        let empty = r#"[{"op": "remove", "path": "/data"}]"#;
        kubectl(
            fixture,
            &["-n", "kube-system", "patch", "secret", "raven-controller-webhook", "--type=json", "-p", empty],
        )?;
        // The first replica was killed while it held the Lease, so the next one leads only after the Lease has expired.
        eventually(Duration::from_secs(30), "the CRD has a new CA", async || {
            ensure!(ca_bundle(fixture).await? != ca);
            Ok(())
        })
        .await?;
        old_is_served(fixture).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_stored_before_the_crd_affect_only_their_own_gateway() {
    run(test_name!(), async |fixture| {
        fixture.lab.cluster().apply_foreign_crd("v1beta1").await?;
        fixture.put_two_pools().await?;
        fixture.put_node("o-a", 4, &[(LABEL_GATEWAY, "odd")]).await?;
        let endpoint = json!({"nodeName": "o-a", "type": "tunnel", "underNAT": true, "publicIP": "47.xxx.xxx.xxx"});
        fixture.put_gateway("odd", json!({"endpoints": [endpoint]})).await?;
        let unknown = json!({
            "apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": {"name": "unknown"},
            "spec": {"exposeType": "Public"},
        });
        kubectl(fixture, &["apply", "-f", &file(fixture, "unknown", &unknown.to_string())?])?;
        fixture.lab.cluster().apply_crds().await?;
        let _controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;

        let note = "Raven cannot read this Gateway: spec.exposeType: unknown variant `Public`";
        assert_eq!(fixture.event("unknown", "Unreadable", note).await?, "Warning");
        // Before Kubernetes 1.31, the API server refuses a status beside a spec that breaks the schema's rules.
        let version: Value = serde_json::from_str(&kubectl(fixture, &["version", "--output=json"])?)?;
        let (reason, part) = match version["serverVersion"]["minor"].as_str() {
            Some("30") => ("StatusRefused", "spec.endpoints[0]: Invalid value"),
            _ => ("EndpointAddressInvalid", "publicIP 47.xxx.xxx.xxx of the endpoint of node o-a is ignored"),
        };
        assert_eq!(fixture.event("odd", reason, part).await?, "Warning");

        // A person corrects both.
        let endpoint = json!({"nodeName": "o-a", "type": "tunnel", "underNAT": true});
        fixture.put_gateway("odd", json!({"endpoints": [endpoint]})).await?;
        fixture.put_gateway("unknown", json!({"exposeType": ""})).await?;
        fixture.until("odd", "elects its node", |g| crate::fixture::elects(g, &["o-a"])).await?;
        fixture
            .until("unknown", "has no node", |g| crate::fixture::has_condition(g, "Ready", "False", "NoNode", ""))
            .await?;
        Ok(())
    })
    .await;
}

async fn old_is_served(fixture: &Fixture) -> Result<()> {
    // Usually within a second. In some runs, the API server uses the old address for about 25 s after
    // the CRD has changed.
    eventually(Duration::from_secs(90), "Gateways of v1alpha1 can be read", async || {
        kubectl(fixture, &["get", OLD]).map(drop)
    })
    .await
}

async fn ca_bundle(fixture: &Fixture) -> Result<Vec<u8>> {
    let crds: Api<CustomResourceDefinition> = Api::all(fixture.lab.cluster().client());
    let conversion = crds.get(GATEWAY_CRD).await?.spec.conversion.context("the CRD has no conversion")?;
    let config = conversion.webhook.and_then(|w| w.client_config).context("the conversion has no webhook")?;
    ensure!(config.service.is_some() && config.url.is_none(), "{config:?}");
    Ok(config.ca_bundle.context("the webhook has no CA")?.0)
}

fn kubectl(fixture: &Fixture, args: &[&str]) -> Result<String> {
    fixture.lab.cluster().kubectl(args)
}

fn get(fixture: &Fixture, resource: &str, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&kubectl(fixture, &["get", resource, name, "-o", "json"])?)?)
}

fn file(fixture: &Fixture, name: &str, text: &str) -> Result<String> {
    let path: PathBuf = fixture.lab.logs().join(format!("{name}.manifest"));
    std::fs::write(&path, text)?;
    Ok(path.to_string_lossy().into_owned())
}
