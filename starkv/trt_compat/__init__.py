# SPDX-License-Identifier: Apache-2.0
"""Every name of the package ``tensorrt`` that starkv uses, and what differs between its versions.

Only modules of this package touch ``tensorrt``; tests compare each name used here with the real bindings of
every supported version. Nothing of it imports ``tensorrt`` before it is called.
"""
