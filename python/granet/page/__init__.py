"""`granet report --html`: runs as one page that needs nothing but itself.

`gather` and `network` read run directories into values, `charts` and `pictures` draw values,
`figures` and `tables` choose what is drawn, `document` puts it into a page.
"""
