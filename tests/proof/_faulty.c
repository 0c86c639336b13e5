// Copyright (c) 2026, the iommufd.host authors
// Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
// SPDX-License-Identifier: BSD-2-Clause

// Two PCI drivers that misbehave on demand, for the long runs. Neither names a device: both take only what
// driver_override gives them.
//   faulty_vfio_pci  refuses to take the function that "deny" names, with the error number "error"
//   stubborn         does not let go of a function while "hold" is set

#include <linux/delay.h>
#include <linux/module.h>
#include <linux/pci.h>

static char *deny = "";
module_param(deny, charp, 0644);
static int error = EPERM;
module_param(error, int, 0644);
static bool hold;
module_param(hold, bool, 0644);

static const struct pci_device_id nothing[] = { { 0 } };

static int faulty_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	return sysfs_streq(deny, pci_name(device)) ? -error : 0;
}

static void faulty_remove(struct pci_dev *device)
{
}

static int stubborn_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	return 0;
}

static void stubborn_remove(struct pci_dev *device)
{
	while (READ_ONCE(hold))
		msleep(20);
}

static struct pci_driver faulty = {
	.name = "faulty_vfio_pci", .id_table = nothing, .probe = faulty_probe, .remove = faulty_remove,
};
static struct pci_driver stubborn = {
	.name = "stubborn", .id_table = nothing, .probe = stubborn_probe, .remove = stubborn_remove,
};

static int __init start(void)
{
	int status = pci_register_driver(&faulty);

	if (status)
		return status;
	status = pci_register_driver(&stubborn);
	if (status)
		pci_unregister_driver(&faulty);
	return status;
}

static void __exit end(void)
{
	pci_unregister_driver(&stubborn);
	pci_unregister_driver(&faulty);
}

module_init(start);
module_exit(end);
MODULE_DESCRIPTION("PCI drivers that misbehave on demand");
MODULE_LICENSE("Dual BSD/GPL");
